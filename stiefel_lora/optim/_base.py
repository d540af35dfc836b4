"""What both Riemannian optimizers share: options, groups, state and the order of a step."""

import inspect
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, TypeAlias

import torch
from geoopt import ManifoldTensor
from torch import Tensor

from stiefel_lora._precision import exact_products, reads_at_no_cost, wide_dtype
from stiefel_lora.errors import InputError, check_choice
from stiefel_lora.optim._batch import SKIPPED, Bucket, Piece, StateSpec, Workspace, current, is_capturing, same
from stiefel_lora.optim._kinds import (
    Group,
    Kinds,
    check_dense,
    check_manifolds,
    check_point,
    is_ordinary,
    is_other_manifold,
    is_stiefel,
    manifold_name,
    place,
)
from stiefel_lora.stiefel import (
    METRICS,
    RETRACTIONS,
    project,
    project_,
    project_point,
    retract_,
    riemannian_gradient_,
)

Params: TypeAlias = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]

# The longest step, as the root mean square over the columns of a matrix, in radians to first order: a quarter turn.
# Every retraction is local, so a longer step is a direction and no more; and the Gram matrices of a step keep their
# precision only while eps * |U|^2 is small (float32 loses the manifold from |U| of about 1e3).
_LONGEST_STEP = torch.pi / 2


def bounded_scale(direction: Tensor, size: Tensor | float, square: Tensor | float | None = None) -> Tensor | float:
    """Return -size, reduced where the step -size * direction is longer than a quarter turn a column.

    Args:
        direction: Tangent vectors, shape (k, n, r), or one, shape (n, r).
        size: Step sizes, shape (k,), zero for a matrix that is to stay; or one number.
        square: Squared norms of ``direction``, if they are known; like ``size``.

    Returns:
        What to multiply ``direction`` by, shape (k, 1, 1); or one number.
    """
    limit = _LONGEST_STEP * direction.shape[-1] ** 0.5
    alone = direction.dim() == 2
    if square is None:
        norm = torch.linalg.vector_norm(direction, dim=None if alone else (-2, -1))
    else:
        norm = square**0.5
    if alone:
        longest = limit / max(norm.item() if isinstance(norm, Tensor) else norm, torch.finfo(direction.dtype).tiny)
        return -min(float(size), longest)
    # A norm of zero gives no bound, one that overflows a step of zero; NaN, of a matrix that stays, is passed over.
    longest = limit / norm
    scale = torch.fmin(longest, size) if isinstance(size, Tensor) else longest.clamp_max_(size)
    return scale.neg_()[:, None, None]


def rate_for(group: Group, x: Tensor) -> float | Tensor:
    """Return a group's learning rate; as a tensor on another device than ``x`` only where that is no matter."""
    lr: float | Tensor = group["lr"]
    return lr.to(x.device) if isinstance(lr, Tensor) and not reads_at_no_cost(lr) else lr


def _moves(square: Tensor) -> Tensor | None:
    """Tell which matrices are updated, from their gradients' squared norms, shape (k,); None if all are known to be.

    A matrix whose gradient has a NaN, an infinity or a norm that overflows stays where it is.
    """
    if reads_at_no_cost(square) and square.max().item() < torch.inf:
        return None
    return square < torch.inf


class RiemannianOptimizer(torch.optim.Optimizer):
    """Base of the Riemannian optimizers; see ``RiemannianAdam`` and ``RiemannianSGD``.

    A parameter on a Stiefel manifold is updated with the geometry of ``stiefel_lora.stiefel``, together with all others
    of its shape, dtype and device; one on any other geoopt manifold through geoopt's own interface; every other one
    by torch's optimizer, an instance of which works on this optimizer's groups and state.

    The step on a Stiefel manifold has the parameters' own precision (float32 for lower ones) under autocast and with
    TF32 or bf16 products allowed as well: with these a point would not stay orthonormal.

    No compiled step is offered: a compiled function calls ``step`` as it is. The time is in matrix products that are
    batched already: for 20 + 20 matrices of rank 16 on two CPU cores a step with graph breaks took 4.3 ms, after 46 s
    of compilation, one as it is 3.1 ms; and torch 2.13, left to trace it, leaves the parameters where they are.
    """

    _ordinary_class: ClassVar[type[torch.optim.Optimizer]]

    def __init__(
        self,
        params: Params,
        ordinary_options: dict[str, Any],
        *,
        retraction: str,
        metric: str,
        stabilize: int | None,
        project: bool,
        error_if_nonfinite: bool,
        **own_options: Any,
    ) -> None:
        # torch's own constructor checks the options that it knows.
        try:
            self._ordinary = self._ordinary_class([_placeholder()], **ordinary_options)
        except (ValueError, RuntimeError) as error:
            raise InputError(f"{error} (what torch.optim.{self._ordinary_class.__name__} allows)") from error
        self._forget()
        defaults = {
            **self._ordinary.defaults,
            **own_options,
            "retraction": retraction,
            "metric": metric,
            "stabilize": stabilize,
            "project": project,
            "error_if_nonfinite": error_if_nonfinite,
        }
        super().__init__(params, defaults)

    # -- what a subclass says ----------------------------------------------------------------------

    def _state_spec(self, group: Group) -> dict[str, StateSpec | None]:
        """Return the state that the update of a Stiefel parameter in this group keeps, None if with other options."""
        raise NotImplementedError

    def _stiefel_step(
        self, piece: Piece, rgrad: Tensor, square: Tensor | float, moves: Tensor | None, group: Group
    ) -> tuple[Tensor, Tensor | float]:
        """Update a piece's state in place and return the tangent step as a direction and what to multiply it by.

        Args:
            piece: The matrices and their state.
            rgrad: Riemannian gradients, shape (k, n, r), or (n, r) of a matrix alone, without NaN or infinity; may be
                overwritten.
            square: Their squared norms, shape (k,), NaN or infinite where ``moves`` is false; a number for one alone.
            moves: Whether a matrix is updated, shape (k,); where not, it keeps its state. None if all are known to be.
            group: The options.

        Returns:
            Tangent vectors in the shape of ``rgrad``, which they may be, and a scale, shape (k, 1, 1) or one number,
            that is zero where ``moves`` is false.
        """
        raise NotImplementedError

    def _geoopt_step(self, p: ManifoldTensor, rgrad: Tensor, group: Group) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the next point of a parameter on another manifold of geoopt and its next state; change nothing."""
        raise NotImplementedError

    def _momentum(self, state: dict[str, Tensor]) -> Tensor | None:
        """Return the tangent vectors in a state that move along with the point, None if there are none."""
        raise NotImplementedError

    # -- torch.optim's contract --------------------------------------------------------------------

    def add_param_group(self, param_group: Group) -> None:
        """Add a group of parameters; its own options override the defaults.

        Raises:
            InputError: If an option is not allowed, or a Stiefel parameter is wide, not of a floating dtype, or off
                the manifold by more than rounding (unless ``project=True``, which moves it to the nearest point).
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._check_group(group)
            for i, p in enumerate(group["params"]):
                if is_stiefel(p):
                    where = place(group, len(self.param_groups) - 1, i)
                    check_point(p, where, project=group["project"])
        except (ValueError, TypeError):
            self.param_groups.pop()
            raise
        group["manifolds"] = [manifold_name(p) for p in group["params"]]
        self._forget()

    def _check_group(self, group: Group) -> None:
        check_choice("retraction", group["retraction"], tuple(RETRACTIONS))
        check_choice("metric", group["metric"], METRICS)
        if group.get("differentiable"):
            raise InputError("differentiable=True is not supported: the step on the manifold works in place")
        if group.get("capturable"):
            _check_capturable(group)
        stabilize = group["stabilize"]
        if stabilize is not None and (not isinstance(stabilize, int) or stabilize < 1):
            raise InputError(f"stabilize must be None or a positive number of steps, got {stabilize!r}")

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # Pickling and deepcopy keep the groups and the state only; the rest follows from them.
        self._ordinary = self._ordinary_class([_placeholder()], lr=1e-3)  # type: ignore[call-arg]
        self._forget()
        self._migrate_ordinary()

    def _migrate_ordinary(self) -> None:
        """Let torch bring what another version of its optimizer has saved up to date."""
        lent = [{**group, "params": [p for p in group["params"] if is_ordinary(p)]} for group in self.param_groups]
        self._ordinary.__setstate__({"state": self.state, "param_groups": lent})
        for group, migrated in zip(self.param_groups, lent, strict=True):
            group.update({**migrated, "params": group["params"]})

    def _forget(self) -> None:
        """Drop what follows from the groups and the state."""
        self._kinds: dict[int, Kinds] = {}
        self._buckets: dict[int, list[Bucket]] = {}
        self._workspace = Workspace()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state saved by ``state_dict()``, of torch's or geoopt's optimizers too, onto any device and dtype.

        Options that it does not name stay as they are.

        Raises:
            InputError: If it names an option that is not allowed.
            ManifoldError: If a parameter was on another manifold when the state was saved, or on one and is not now,
                or the reverse.
            ValueError: If groups or their sizes differ.
        """
        groups, loaded = self.param_groups, {}

        def check(_: torch.optim.Optimizer, given: dict[str, Any]) -> None:
            self._check_loaded(given)
            loaded.update(given)

        def finish(_: torch.optim.Optimizer) -> None:
            self._finish_loading(loaded, groups)

        # What a user's hooks return is loaded, and what they do afterwards stays.
        with (
            self.register_load_state_dict_pre_hook(check),
            self.register_load_state_dict_post_hook(finish, prepend=True),
        ):
            super().load_state_dict(state_dict)

    def _check_loaded(self, state_dict: dict[str, Any]) -> None:
        # torch refuses other numbers of groups itself.
        for g, (saved, group) in enumerate(zip(state_dict["param_groups"], self.param_groups, strict=False)):
            self._check_group({**group, **saved, "params": group["params"]})
            check_manifolds(saved, group, g)

    def _finish_loading(self, state_dict: dict[str, Any], groups_before: list[Group]) -> None:
        for saved, group, before in zip(state_dict["param_groups"], self.param_groups, groups_before, strict=True):
            # Where the state names none, torch has put in defaults of its own.
            group.update({key: before[key] for key in self.defaults if key not in saved})
            group["manifolds"] = [manifold_name(p) for p in group["params"]]
        # torch has cast every tensor to its parameter's dtype; counts and what we keep in float32 must not be.
        ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for i, p in zip(ids, params, strict=True):
            for key, value in state_dict["state"].get(i, {}).items():
                if not is_ordinary(p) and isinstance(value, Tensor):
                    self.state[p][key] = _uncast(value, self.state[p][key], p)
        for saved, group in zip(state_dict["param_groups"], self.param_groups, strict=True):
            if "manifolds" not in saved:  # of another optimizer, whose momentum need not be tangent
                for p in filter(is_stiefel, group["params"]):
                    self._project_momentum(p)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; ``p.grad`` is only read.

        Args:
            closure: Re-evaluates the model with gradients enabled and returns the loss.

        Returns:
            What the closure returned, else None.

        Raises:
            InputError: Before anything is changed, if a gradient of a manifold parameter is sparse or, with
                ``error_if_nonfinite``, has a NaN or infinity, or if its state is of another shape.
        """
        return self._step(closure)

    @torch.compiler.disable
    def _step(self, closure: Callable[[], Any] | None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        kinds = [self._group_kinds(index) for index in range(len(self.param_groups))]
        # Every attribute of a ManifoldParameter takes a detour through Python otherwise.
        with torch._C.DisableTorchFunctionSubclass():
            check_dense(p for kind in kinds for p in kind.stiefel + kind.other)
            self._raise_if_nonfinite()
            buckets = [self._group_buckets(index, kind.stiefel) for index, kind in enumerate(kinds)]
        self._step_ordinary([kind.ordinary for kind in kinds])
        with torch._C.DisableTorchFunctionSubclass():
            self._step_stiefel(buckets)
        for group, kind in zip(self.param_groups, kinds, strict=True):
            for p in kind.other:
                if p.grad is not None:
                    self._step_geoopt(p, p.grad, group)
        return loss

    # -- the step ----------------------------------------------------------------------------------

    def _group_kinds(self, index: int) -> Kinds:
        params = self.param_groups[index]["params"]
        kinds = self._kinds.get(index)
        if kinds is None or not same(kinds.params, params):
            kinds = self._kinds[index] = Kinds(params)
            self._buckets.pop(index, None)
        return kinds

    def _step_ordinary(self, params: list[list[Tensor]]) -> None:
        if not any(params):
            return
        ordinary = self._ordinary
        ordinary.state = self.state
        ordinary.param_groups = [
            {**group, "params": own} for group, own in zip(self.param_groups, params, strict=True) if own
        ]
        # Hooks on all optimizers and the profiler are to see one step, ours.
        inspect.unwrap(type(ordinary).step, stop=lambda step: not hasattr(step, "hooked"))(ordinary)

    def _step_stiefel(self, buckets: list[list[Bucket]]) -> None:
        self._check_capture(buckets)
        largest = max((bucket.nbytes for alike in buckets for bucket in alike), default=0)
        # Nothing lowers the precision of float64.
        narrow = {b.params[0].device.type for alike in buckets for b in alike if b.dtype != torch.float64}
        with exact_products(narrow):
            for group, alike in zip(self.param_groups, buckets, strict=True):
                # The point itself is not needed any more where it and the step have been added up.
                in_place = RETRACTIONS[group["retraction"]].of_sum
                for bucket in alike:
                    for piece in bucket.pieces(self._workspace, largest, in_place=in_place):
                        self._step_piece(piece, group)

    def _check_capture(self, buckets: list[list[Bucket]]) -> None:
        """Raise where a step is being captured in a CUDA graph that would not do the same when it is replayed."""
        for group, alike in zip(self.param_groups, buckets, strict=True):
            # As in torch, SGD has no such option, and needs none.
            if not group.get("capturable", True) and any(is_capturing(bucket.params[0]) for bucket in alike):
                raise InputError("a step is captured in a CUDA graph, for which the optimizer needs capturable=True")

    def _step_piece(self, piece: Piece, group: Group) -> None:
        x = piece.point
        rgrad = riemannian_gradient_(x, piece.grad, group["metric"], piece.work)
        if group["maximize"]:
            rgrad.neg_()
        norm = torch.linalg.vector_norm(rgrad, dim=None if piece.alone else (-2, -1))
        square: Tensor | float = norm.item() ** 2 if piece.alone else norm.square_()
        if isinstance(square, float) and not square <= torch.finfo(x.dtype).max:
            piece.state["skipped"] += 1
            return
        moves = _moves(square) if isinstance(square, Tensor) else None
        if moves is not None:
            piece.state["skipped"] += ~moves
            # From here on its gradient is finite, and all that is done with a matrix that stays is multiplied by zero.
            rgrad.nan_to_num_(0, 0, 0)
        direction, scale = self._stiefel_step(piece, rgrad, square, moves, group)
        lr = group["lr"]
        if (not isinstance(lr, Tensor) or reads_at_no_cost(lr)) and lr == 0:
            return  # to the very bit, which torch's set_optimizer_state_dict relies on
        new = retract_(x, direction, scale, group["retraction"], work=rgrad, into=piece.into, moves=moves)
        momentum = self._momentum(piece.state)
        if momentum is not None:
            project_(new, momentum)
        piece.write_back(new)

    def _step_geoopt(self, p: ManifoldTensor, grad: Tensor, group: Group) -> None:
        # As for a Stiefel parameter: a gradient that is not finite leaves the point and its state as they are.
        finite = grad.isfinite().all()
        grad = torch.where(finite, -grad if group["maximize"] else grad, 0)
        if group["weight_decay"] != 0:
            grad = grad.add(p, alpha=group["weight_decay"])
        state = self.state[p]
        new, new_state = self._geoopt_step(p, p.manifold.egrad2rgrad(p, grad), group)
        p.copy_(torch.where(finite, new, p))
        for key, value in new_state.items():
            state[key] = torch.where(finite, value, state.get(key, torch.zeros_like(value)))
        state["skipped"] = state.get("skipped", 0) + (~finite).to(torch.int64)
        if group["stabilize"] is not None:
            state["since_stabilized"] = (state.get("since_stabilized", 0) + 1) % group["stabilize"]
            if state["since_stabilized"] == 0:
                self._stabilize_parameter(p)

    def _group_buckets(self, index: int, params: list[Tensor]) -> list[Bucket]:
        group = self.param_groups[index]
        spec: dict[str, StateSpec | None] = {**self._state_spec(group), "skipped": SKIPPED}
        buckets = self._buckets.get(index)
        if buckets is None or not all(bucket.is_current(spec, self.state) for bucket in buckets):
            alike: dict[Any, list[Tensor]] = {}
            for p in params:
                alike.setdefault((p.shape[-2:], p.dtype, p.device), []).append(p)
            buckets = self._buckets[index] = [Bucket(batch, spec, self.state) for batch in alike.values()]
        return buckets

    # -- gradients that are not finite -------------------------------------------------------------

    @property
    def skipped_updates(self) -> int:
        """How many updates of single matrices were left out because of a NaN or infinity; waits for the device.

        One in the gradient, or in the square of its norm.
        """
        return sum(int(state["skipped"].sum()) for state in self.state.values() if "skipped" in state)

    def _raise_if_nonfinite(self) -> None:
        for g, group in enumerate(self.param_groups):
            if not group["error_if_nonfinite"]:
                continue
            for i, p in enumerate(group["params"]):
                if not is_ordinary(p) and p.grad is not None and not p.grad.isfinite().all():
                    raise InputError(
                        f"the gradient of {place(group, g, i)}, shape {tuple(p.shape)}, has a NaN or infinity"
                    )

    # -- geoopt's interface ------------------------------------------------------------------------

    def stabilize(self) -> None:
        """Put every parameter on a manifold, and its momentum, back on it (geoopt's method of this name)."""
        for group in self.param_groups:
            self.stabilize_group(group)

    def stabilize_group(self, group: Group) -> None:
        """Put the parameters of one group that are on a manifold of geoopt, and their momenta, back on it.

        Stiefel parameters need it only if something other than this optimizer has written to them.
        """
        for p in group["params"]:
            if not is_ordinary(p):
                self._stabilize_parameter(p)

    @torch.no_grad()
    def _stabilize_parameter(self, p: ManifoldTensor) -> None:
        master = self.state[p].get("master") if p in self.state else None
        if master is not None:
            master.copy_(project_point(current(p.to(master.dtype), master, p.dtype)))
            p.copy_(master)
        else:
            p.copy_(project_point(p) if is_stiefel(p) else p.manifold.projx(p))
        self._project_momentum(p)

    @torch.no_grad()
    def _project_momentum(self, p: ManifoldTensor) -> None:
        """Make a parameter's momentum tangent at it."""
        state = self.state[p] if p in self.state else {}
        momentum = self._momentum(state)
        if momentum is None or momentum.shape != p.shape:
            return
        point = state.get("master", p).to(momentum.dtype)
        momentum.copy_(project(point, momentum) if is_stiefel(p) else p.manifold.proju(point, momentum))


def _check_capturable(group: Group) -> None:
    """Raise where a step with these options could not be captured in a CUDA graph."""
    reasons = {
        "retraction='exp'": group["retraction"] == "exp",
        "error_if_nonfinite=True": group["error_if_nonfinite"],
        "parameters on other manifolds than Stiefel": any(map(is_other_manifold, group["params"])),
    }
    for reason, waits in reasons.items():
        if waits:
            raise InputError(f"capturable=True does not go with {reason}, whose step waits for the device")


def _placeholder() -> Tensor:
    # torch's optimizers refuse an empty list; the groups they work on are handed to them at each step.
    return torch.nn.Parameter(torch.empty(0))


def _uncast(saved: Tensor, cast: Tensor, p: Tensor) -> Tensor:
    """Return a saved state tensor in the dtype it is to have, given what torch has cast it to."""
    if not saved.is_floating_point():
        return saved.to(p.device)
    return saved.to(p.device, wide_dtype(p.dtype)) if is_stiefel(p) else cast
