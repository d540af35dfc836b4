"""The contract of torch.optim: constructors, groups, state, checkpoints, closures, schedulers, scalers, hooks."""

import copy
import functools
import inspect
import io
import pickle
from collections.abc import Callable
from typing import Any

import geoopt
import pytest
import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from stiefel_lora import stiefel
from stiefel_lora.errors import InputError, ManifoldError
from stiefel_lora.optim import RiemannianAdam, RiemannianSGD, _base, _batch

PAIRS = {"adam": (RiemannianAdam, torch.optim.AdamW), "sgd": (RiemannianSGD, torch.optim.SGD)}
# What makes each optimizer keep a momentum, and a step size for the tests.
COMMON: dict[str, dict[str, Any]] = {"adam": {"lr": 0.05}, "sgd": {"lr": 0.05, "momentum": 0.9}}


def parameter(*shape: int, dtype: torch.dtype = torch.float64) -> geoopt.ManifoldParameter:
    return geoopt.ManifoldParameter(stiefel.random_point(*shape, dtype=dtype), manifold=geoopt.EuclideanStiefel())


def mixed(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [
        parameter(12, 4, dtype=dtype),
        torch.nn.Parameter(torch.randn(5, dtype=dtype)),
        parameter(12, 4, dtype=dtype),
    ]


def copies(params: list[Tensor]) -> list[Tensor]:
    return copy.deepcopy(params)


def set_grads(params: list[Tensor], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)


def steps(optimizer: torch.optim.Optimizer, params: list[Tensor], seeds: range) -> None:
    for seed in seeds:
        set_grads(params, seed)
        optimizer.step()


def assert_same(a: list[Tensor], b: list[Tensor]) -> None:
    for p, q in zip(a, b, strict=True):
        assert torch.equal(p.detach(), q.detach())


# -- constructors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PAIRS)
def test_signature_covers_torchs_and_geoopts(kind: str) -> None:
    ours, torchs = PAIRS[kind]
    geoopts = {"adam": geoopt.optim.RiemannianAdam, "sgd": geoopt.optim.RiemannianSGD}[kind]
    named = inspect.signature(ours.__init__).parameters
    assert not any(p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL) for p in named.values())
    for name, p in inspect.signature(torchs.__init__).parameters.items():
        assert name in named, name
        if name not in ("self", "params", "weight_decay"):  # AdamW decays by default, an adapter does not
            assert named[name].default == p.default, name
    for name, p in inspect.signature(geoopts.__init__).parameters.items():
        assert name in named or p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL), name
    assert "stabilize" in named
    for theirs in (torchs, geoopts):
        # geoopt's Adam hands whatever it is given to torch's.
        order = positional(theirs) if positional(theirs) != ["self"] else positional(torch.optim.Adam)
        assert positional(ours)[: len(order)] == order


def positional(optimizer: type) -> list[str]:
    named = inspect.signature(optimizer.__init__).parameters.values()  # type: ignore[misc]
    return [p.name for p in named if p.kind == p.POSITIONAL_OR_KEYWORD]


ORDINARY_OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("adam", {}),
    ("adam", {"lr": 3e-3, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}),
    ("adam", {"amsgrad": True, "weight_decay": 0.01}),
    ("adam", {"maximize": True}),
    ("adam", {"foreach": True}),
    ("adam", {"foreach": False}),
    ("adam", {"fused": True}),
    ("adam", {"lr": torch.tensor(2e-3), "foreach": False}),
    ("sgd", {}),
    ("sgd", {"momentum": 0.9, "dampening": 0.2, "weight_decay": 0.1}),
    ("sgd", {"momentum": 0.9, "nesterov": True}),
    ("sgd", {"momentum": 0.9, "maximize": True}),
    ("sgd", {"foreach": True, "momentum": 0.5}),
    ("sgd", {"fused": True, "momentum": 0.5}),
    ("sgd", {"lr": torch.tensor(2e-3), "foreach": False}),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("kind", "options"), ORDINARY_OPTIONS, ids=str)
def test_ordinary_parameters_are_bit_equal_to_torch(kind: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    """50 steps beside a manifold parameter, through a pickled state in the middle, with gradients that come late."""
    ours_class, torch_class = PAIRS[kind]
    shapes = [(7, 3), (5,), (), (2, 3, 4)]
    ours = [torch.nn.Parameter(torch.randn(s, dtype=dtype)) for s in shapes]
    theirs = copies(ours)
    options = {"weight_decay": 0.0, **options}
    a = ours_class([*ours, parameter(12, 4)], **options)
    b = torch_class(theirs, **options)
    for step in range(50):
        set_grads(ours, step)
        if step < 3 and not (kind == "sgd" and options.get("fused")):  # torch's own fused SGD fails on that
            ours[1].grad = None
        for p, q in zip(ours, theirs, strict=True):
            q.grad = None if p.grad is None else p.grad.clone()
        a.param_groups[0]["params"][-1].grad = torch.randn(12, 4, dtype=torch.float64)
        a.step()
        b.step()
        if step == 25:
            buffer = io.BytesIO()
            torch.save(a.state_dict(), buffer)
            a = ours_class([*ours, a.param_groups[0]["params"][-1]], **options)
            buffer.seek(0)
            a.load_state_dict(torch.load(buffer))
    assert_same(ours, theirs)


@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"retraction": "svd"}, "retraction must be one of 'qr', 'cayley', 'polar', 'exp', got 'svd'"),
        ({"metric": "flat"}, "metric must be one of 'euclidean', 'canonical', got 'flat'"),
        ({"differentiable": True}, "differentiable=True is not supported"),
        ({"stabilize": 0}, "stabilize must be None or a positive number of steps, got 0"),
        ({"lr": -1.0}, "Invalid learning rate"),
        ({"weight_decay": -1.0}, "Invalid weight_decay"),
        ({"foreach": True, "fused": True}, "cannot be `True` together"),
    ],
)
def test_bad_options_are_named(kind: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        PAIRS[kind][0]([parameter(12, 4)], **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"retraction": "exp"}, "retraction='exp'"), ({"error_if_nonfinite": True}, "error_if_nonfinite=True")],
)
def test_capturable_does_not_go_with_what_waits(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=f"capturable=True does not go with {message}, whose step waits"):
        RiemannianAdam([parameter(12, 4)], capturable=True, **options)
    optimizer = RiemannianAdam([parameter(12, 4)], capturable=True)
    state = RiemannianAdam([parameter(12, 4)], **options).state_dict()
    for group in state["param_groups"]:
        group["capturable"] = True
    with pytest.raises(InputError, match="capturable=True does not go with"):
        optimizer.load_state_dict(state)


def test_capturable_does_not_go_with_other_manifolds() -> None:
    ball = geoopt.ManifoldParameter(torch.zeros(3), manifold=geoopt.PoincareBall())
    with pytest.raises(InputError, match="capturable=True does not go with parameters on other manifolds"):
        RiemannianAdam([ball], capturable=True)


def test_capturable_changes_no_step_outside_a_graph() -> None:
    # On a CPU the ordinary parameters could not have it: torch's AdamW refuses.
    p, q = parameter(12, 4), parameter(12, 4)
    with torch.no_grad():
        q.copy_(p)
    for x, capturable in ((p, False), (q, True)):
        optimizer = RiemannianAdam([x], lr=0.1, capturable=capturable)
        for seed in range(3):
            x.grad = torch.randn(12, 4, dtype=x.dtype, generator=torch.Generator().manual_seed(seed))
            optimizer.step()
    assert torch.equal(p, q)


def test_bad_options_of_one_optimizer_are_named() -> None:
    with pytest.raises(InputError, match="second_moment must be one of 'mean', 'norm', 'row', 'element', got 'max'"):
        RiemannianAdam([parameter(12, 4)], second_moment="max")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="Invalid beta"):
        RiemannianAdam([parameter(12, 4)], betas=(1.0, 0.9))
    with pytest.raises(InputError, match="Nesterov momentum requires"):
        RiemannianSGD([parameter(12, 4)], nesterov=True)
    with pytest.raises(TypeError, match="unexpected keyword argument 'moment'"):
        RiemannianAdam([parameter(12, 4)], moment=1)  # type: ignore[call-arg]


# -- groups ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PAIRS)
def test_groups_have_their_own_options(kind: str) -> None:
    ps = [parameter(12, 4) for _ in range(3)]
    qs = copies(ps)
    options = [{"retraction": "qr"}, {"retraction": "cayley", "lr": 0.01}, {"metric": "canonical"}]
    grouped = PAIRS[kind][0]([{"params": [p], **o} for p, o in zip(ps, options, strict=True)], **COMMON[kind])
    single = [PAIRS[kind][0]([q], **{**COMMON[kind], **o}) for q, o in zip(qs, options, strict=True)]
    for seed in range(4):
        set_grads(ps, seed)
        set_grads(qs, seed)
        grouped.step()
        for optimizer in single:
            optimizer.step()
    assert_same(ps, qs)


@pytest.mark.parametrize("kind", PAIRS)
def test_add_param_group(kind: str) -> None:
    first, second = mixed(), mixed()
    late, again = copies(first), copies(second)
    optimizer = PAIRS[kind][0](first, **COMMON[kind])
    steps(optimizer, first, range(2))
    optimizer.add_param_group({"params": second, "retraction": "cayley"})
    assert optimizer.param_groups[1]["lr"] == 0.05
    steps(optimizer, first + second, range(2, 5))
    reference = PAIRS[kind][0](late, **COMMON[kind])
    steps(reference, late, range(2))
    other = PAIRS[kind][0](again, **COMMON[kind], retraction="cayley")
    for seed in range(2, 5):
        set_grads(late + again, seed)
        reference.step()
        other.step()
    assert_same(first + second, late + again)


@pytest.mark.parametrize("kind", PAIRS)
def test_a_refused_group_leaves_the_optimizer_as_it_was(kind: str) -> None:
    optimizer = PAIRS[kind][0]([parameter(12, 4)], **COMMON[kind])
    with pytest.raises(InputError):
        optimizer.add_param_group({"params": [parameter(9, 2)], "retraction": "svd"})
    assert len(optimizer.param_groups) == 1


# -- state and checkpoints ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("how", ["state_dict", "deepcopy", "pickle"])
def test_a_copy_in_mid_run_goes_on_bit_for_bit(kind: str, dtype: torch.dtype, how: str) -> None:
    params = mixed(dtype)
    optimizer = PAIRS[kind][0](params, **COMMON[kind])
    steps(optimizer, params, range(4))
    if how == "state_dict":
        buffer = io.BytesIO()
        torch.save(optimizer.state_dict(), buffer)
        buffer.seek(0)
        twins = copies(params)
        # The parameters lie off the master by bf16 rounding, which is within bf16's tolerance.
        other = PAIRS[kind][0](twins, **COMMON[kind])
        other.load_state_dict(torch.load(buffer))
    elif how == "deepcopy":
        twins, other = copy.deepcopy((params, optimizer))
    else:
        twins, other = pickle.loads(pickle.dumps((params, optimizer)))  # noqa: S301
    steps(optimizer, params, range(4, 8))
    steps(other, twins, range(4, 8))
    assert_same(params, twins)
    assert all(isinstance(twins[i], geoopt.ManifoldParameter) for i in (0, 2))


@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loaded_state_keeps_float32(kind: str, dtype: torch.dtype) -> None:
    """torch casts loaded state to the parameter's dtype; a float32 master rounded to bf16 would lose the manifold."""
    params = mixed(dtype)
    optimizer = PAIRS[kind][0](params, **COMMON[kind])
    steps(optimizer, params, range(3))
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(saved)
    for key, value in optimizer.state[params[0]].items():
        assert torch.equal(value, saved["state"][0][key]), key
        if value.is_floating_point():
            assert value.dtype == torch.float32, key


@pytest.mark.parametrize("kind", PAIRS)
def test_state_loads_onto_another_dtype(kind: str) -> None:
    params = mixed(torch.float32)
    optimizer = PAIRS[kind][0](params, **COMMON[kind])
    steps(optimizer, params, range(3))
    wide = [
        geoopt.ManifoldParameter(stiefel.project_point(p.detach().double()), manifold=geoopt.EuclideanStiefel())
        if isinstance(p, geoopt.ManifoldParameter)
        else torch.nn.Parameter(p.detach().double())
        for p in params
    ]
    other = PAIRS[kind][0](wide, **COMMON[kind])
    # torch shares what it need not cast between the two optimizers, the step counters for one.
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    steps(optimizer, params, range(3, 6))
    steps(other, wide, range(3, 6))
    for p, q in zip(params, wide, strict=True):
        assert q.dtype == torch.float64
        # Three steps of float32 rounding.
        torch.testing.assert_close(p.detach().double(), q.detach(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", PAIRS)
def test_every_manifold_parameter_has_state_after_the_first_step(kind: str) -> None:
    """Also one without a gradient, so that all ranks of a job save the same keys."""
    params = [parameter(12, 4), parameter(12, 4), parameter(9, 2)]
    optimizer = PAIRS[kind][0](params, **COMMON[kind])
    params[0].grad = torch.randn_like(params[0])
    optimizer.step()
    keys = [sorted(optimizer.state_dict()["state"][i]) for i in range(3)]
    assert keys[0] == keys[1] == keys[2]
    assert "skipped" in keys[0]


@pytest.mark.parametrize("kind", PAIRS)
def test_state_holds_one_momentum_and_numbers(kind: str) -> None:
    p = parameter(64, 8, dtype=torch.float32)
    optimizer = PAIRS[kind][0]([p], **COMMON[kind])
    steps(optimizer, [p], range(2))
    sizes = sorted(value.numel() for value in optimizer.state[p].values())
    assert sizes[-1] == p.numel()
    assert sizes[-2] == 1


@pytest.mark.parametrize("kind", PAIRS)
def test_clearing_the_state_starts_anew(kind: str) -> None:
    params = mixed()
    optimizer = PAIRS[kind][0](params, **COMMON[kind])
    steps(optimizer, params, range(3))
    optimizer.state.clear()
    twins = copies(params)
    steps(optimizer, params, range(3, 5))
    steps(PAIRS[kind][0](twins, **COMMON[kind]), twins, range(3, 5))
    assert_same(params, twins)


# A change of a state from outside, and one in place that comes to the same.
CHANGES: dict[str, tuple[Callable[[dict[str, Any], str], Any], Callable[[dict[str, Any], str], Any]]] = {
    "replaced": (lambda s, key: s.update({key: 2 * s[key]}), lambda s, key: s[key].mul_(2)),
    "set to zero": (lambda s, key: s.update({key: torch.zeros_like(s[key])}), lambda s, key: s[key].zero_()),
    "deleted": (lambda s, key: s.pop(key), lambda s, key: s[key].zero_()),
    "cleared": (lambda s, _: s.clear(), lambda s, _: [value.zero_() for value in s.values()]),
}


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", PAIRS)
def test_state_that_someone_else_changes_counts(kind: str, change: str, count: int) -> None:
    params: list[Tensor] = [parameter(12, 4) for _ in range(count)]
    twins = copies(params)
    key = {"adam": "exp_avg", "sgd": "momentum_buffer"}[kind]
    for ps, edit in zip((params, twins), CHANGES[change], strict=True):
        optimizer = PAIRS[kind][0](ps, **COMMON[kind])
        steps(optimizer, ps, range(3))
        edit(optimizer.state[ps[0]], key)
        steps(optimizer, ps, range(3, 6))
    assert_same(params, twins)


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("kind", PAIRS)
def test_what_someone_else_keeps_in_the_state_stays(kind: str, count: int) -> None:
    params: list[Tensor] = [parameter(12, 4) for _ in range(count)]
    twins = copies(params)
    for ps in (params, twins):
        optimizer = PAIRS[kind][0](ps, **COMMON[kind])
        if ps is params:
            optimizer.state[ps[0]]["before"] = torch.ones(3)
        steps(optimizer, ps, range(2))
        if ps is params:
            optimizer.state[ps[0]]["after"] = "a note"
        steps(optimizer, ps, range(2, 4))
        optimizer.param_groups[0]["momentum" if kind == "sgd" else "amsgrad"] = 0.5 if kind == "sgd" else True
        steps(optimizer, ps, range(4, 6))
        if ps is params:
            assert torch.equal(optimizer.state[ps[0]]["before"], torch.ones(3))
            assert optimizer.state[ps[0]]["after"] == "a note"
    assert_same(params, twins)


def test_state_of_an_option_that_is_switched_off_is_dropped() -> None:
    """A momentum that did not move along would not be tangent when it is switched on again."""
    p = parameter(12, 4)
    optimizer = RiemannianSGD([p], lr=0.05, momentum=0.9)
    steps(optimizer, [p], range(2))
    optimizer.param_groups[0]["momentum"] = 0.0
    steps(optimizer, [p], range(2, 4))
    assert list(optimizer.state[p]) == ["skipped"]


@pytest.mark.parametrize("kind", PAIRS)
def test_a_lost_manifold_is_an_error(kind: str) -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = parameter(12, 4)

    model = Model()
    optimizer = PAIRS[kind][0](model.named_parameters(), **COMMON[kind])
    steps(optimizer, list(model.parameters()), range(2))
    saved = optimizer.state_dict()
    fresh = Model()
    fresh.load_state_dict({"weight": model.weight.detach().as_subclass(Tensor).clone()}, assign=True)
    assert not isinstance(fresh.weight, geoopt.ManifoldParameter)
    again = PAIRS[kind][0](fresh.named_parameters(), **COMMON[kind])
    with pytest.raises(
        ManifoldError, match=r"parameter 0 \(weight\) of group 0 was on manifold EuclideanStiefel .*re-attach"
    ):
        again.load_state_dict(saved)
    plain = PAIRS[kind][0]([torch.nn.Parameter(torch.eye(12, 4))], **COMMON[kind])
    steps(plain, plain.param_groups[0]["params"], range(1))
    with pytest.raises(ManifoldError, match="was an ordinary one"):
        optimizer.load_state_dict(plain.state_dict())


@pytest.mark.parametrize("kind", PAIRS)
def test_another_manifold_is_an_error(kind: str) -> None:
    """Another metric of the same one is none: all Stiefel parameters move with our geometry."""
    euclidean = parameter(12, 4)
    canonical = geoopt.ManifoldParameter(euclidean.detach().clone(), manifold=geoopt.CanonicalStiefel())
    ball = geoopt.ManifoldParameter(torch.zeros(12, 4, dtype=torch.float64), manifold=geoopt.PoincareBall().double())
    optimizers = [PAIRS[kind][0]([p], **COMMON[kind]) for p in (euclidean, canonical, ball)]
    for optimizer in optimizers:
        steps(optimizer, optimizer.param_groups[0]["params"], range(2))
    optimizers[1].load_state_dict(optimizers[0].state_dict())
    assert optimizers[1].param_groups[0]["manifolds"] == ["CanonicalStiefel"]
    with pytest.raises(
        ManifoldError, match="parameter 0 of group 0 was on manifold EuclideanStiefel .* PoincareBall now"
    ):
        optimizers[2].load_state_dict(optimizers[0].state_dict())
    with pytest.raises(
        ManifoldError, match="parameter 0 of group 0 was on manifold PoincareBall .* EuclideanStiefel now"
    ):
        optimizers[0].load_state_dict(optimizers[2].state_dict())


@pytest.mark.parametrize("kind", PAIRS)
def test_a_state_of_another_number_of_parameters_is_refused_in_torchs_words(kind: str) -> None:
    few, more = (PAIRS[kind][0]([parameter(12, 4) for _ in range(n)], **COMMON[kind]) for n in (1, 2))
    for target, given in ((few, more), (more, few)):
        with pytest.raises(ValueError, match="doesn't match the size of optimizer's group"):
            target.load_state_dict(given.state_dict())


@pytest.mark.parametrize("kind", PAIRS)
def test_a_wrong_option_in_a_loaded_group_is_an_error(kind: str) -> None:
    params = mixed()
    optimizer = PAIRS[kind][0](params, **COMMON[kind])
    steps(optimizer, params, range(2))
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0].update(retraction="svd", lr=7.0)
    with pytest.raises(InputError, match="retraction must be one of .* got 'svd'"):
        optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] == 0.05


@pytest.mark.parametrize("kind", PAIRS)
def test_hooks_around_loading_have_their_say(kind: str) -> None:
    params = mixed()
    optimizer = PAIRS[kind][0](params, **COMMON[kind])
    steps(optimizer, params, range(3))
    key = {"adam": "exp_avg", "sgd": "momentum_buffer"}[kind]
    saved = copy.deepcopy(optimizer.state_dict())
    doubled = copy.deepcopy(saved)
    for i in (0, 2):
        doubled["state"][i][key] *= 2
    optimizer.register_load_state_dict_pre_hook(lambda *_: doubled)
    optimizer.register_load_state_dict_post_hook(lambda o: o.state[params[2]].update({key: torch.zeros(12, 4)}))
    for _ in range(2):
        optimizer.load_state_dict(saved)
        torch.testing.assert_close(optimizer.state[params[0]][key], 2 * saved["state"][0][key], atol=0, rtol=0)
        assert not optimizer.state[params[2]][key].any()
    assert len(optimizer._optimizer_load_state_dict_pre_hooks) == 1
    assert len(optimizer._optimizer_load_state_dict_post_hooks) == 1
    steps(optimizer, params, range(3, 4))


def aged(saved: dict[str, Any]) -> dict[str, Any]:
    """Make a state of torch's optimizer look like one of its first versions."""
    for group in saved["param_groups"]:
        for key in ("maximize", "foreach", "capturable", "differentiable", "fused", "decoupled_weight_decay"):
            group.pop(key, None)
    for state in saved["state"].values():
        if "step" in state:
            state["step"] = int(state["step"])
    return saved


@pytest.mark.parametrize("age", [copy.deepcopy, aged])
@pytest.mark.parametrize(("kind", "options"), ORDINARY_OPTIONS, ids=str)
def test_a_checkpoint_of_torchs_optimizer_goes_on_bit_for_bit(
    kind: str, options: dict[str, Any], age: Callable[[dict[str, Any]], dict[str, Any]]
) -> None:
    ours_class, torch_class = PAIRS[kind]
    theirs = [torch.nn.Parameter(torch.randn(s)) for s in [(7, 3), (5,)]]
    b = torch_class(theirs, **options)
    steps(b, theirs, range(3))
    saved = copy.deepcopy(b.state_dict())
    ours, again = copies(theirs), copies(theirs)
    a = ours_class([{"params": ours, "retraction": "cayley"}])
    a.load_state_dict(age(copy.deepcopy(saved)))
    reference = torch_class(again, lr=1e-3)
    reference.load_state_dict(age(copy.deepcopy(saved)))
    steps(a, ours, range(3, 8))
    steps(reference, again, range(3, 8))
    assert_same(ours, again)
    # What torch does not know stays as it was.
    assert a.param_groups[0]["retraction"] == "cayley"
    assert a.param_groups[0]["manifolds"] == [None, None]


@pytest.mark.parametrize("kind", PAIRS)
def test_a_checkpoint_without_our_options_leaves_them_as_they_are(kind: str) -> None:
    params = mixed()
    optimizer = PAIRS[kind][0]([{"params": params, "retraction": "polar"}], **COMMON[kind])
    steps(optimizer, params, range(2))
    saved = copy.deepcopy(optimizer.state_dict())
    for key in optimizer.defaults.keys() - PAIRS[kind][1](params, lr=1e-3).defaults.keys() | {"manifolds"}:
        del saved["param_groups"][0][key]
    twins = copies(params)
    other = PAIRS[kind][0]([{"params": twins, "retraction": "polar"}], lr=7.0)
    other.load_state_dict(saved)
    steps(optimizer, params, range(2, 4))
    steps(other, twins, range(2, 4))
    for p, q in zip(params, twins, strict=True):
        # What may be another optimizer's has its momentum projected, here by rounding.
        torch.testing.assert_close(p.detach(), q.detach(), rtol=0, atol=1e-14)


def test_a_euclidean_momentum_is_made_tangent_when_it_is_loaded() -> None:
    """torch's SGD keeps the normal part of a gradient, which on the manifold must not move the point."""
    p = parameter(12, 4)
    before = p.detach().clone()
    q = torch.nn.Parameter(before.clone())
    theirs = torch.optim.SGD([q], lr=0.1, momentum=0.9)
    q.grad = 20 * before
    theirs.step()
    ours = RiemannianSGD([p], lr=0.1, momentum=0.9)
    ours.load_state_dict(theirs.state_dict())
    p.grad = 20 * before
    ours.step()
    torch.testing.assert_close(p.detach(), before, rtol=0, atol=1e-14)


@pytest.mark.parametrize("source", ["torch", "geoopt"])
def test_a_loaded_momentum_has_been_begun(source: str) -> None:
    """Neither counts its steps, but dampening is for all gradients but the first."""
    p = parameter(12, 4)
    manifold = p if source == "geoopt" else torch.nn.Parameter(p.detach().clone())
    options = {"lr": 0.01, "momentum": 0.9, "dampening": 0.5}
    theirs = (geoopt.optim.RiemannianSGD if source == "geoopt" else torch.optim.SGD)([manifold], **options)
    manifold.grad = torch.randn(12, 4, dtype=torch.float64)
    theirs.step()
    ours = RiemannianSGD([p], lr=0.01)
    ours.load_state_dict(theirs.state_dict())
    x, momentum = p.detach().clone(), theirs.state[manifold]["momentum_buffer"].as_subclass(Tensor)
    p.grad = torch.randn(12, 4, dtype=torch.float64)
    step = 0.9 * stiefel.project(x, momentum) + 0.5 * stiefel.project(x, p.grad)
    ours.step()
    torch.testing.assert_close(p.detach(), stiefel.retract(x, -0.01 * step, "qr"), rtol=0, atol=1e-14)


@pytest.mark.parametrize("as_rate", [float, torch.tensor])
@pytest.mark.parametrize("kind", PAIRS)
def test_a_state_mapped_by_name_onto_another_order_is_taken(kind: str, as_rate: Any) -> None:
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    model = torch.nn.ParameterDict({"a": parameter(12, 4), "b": torch.randn(5, dtype=torch.float64)})
    twin = copy.deepcopy(model)
    options = {**COMMON[kind], "lr": as_rate(COMMON[kind]["lr"])}
    optimizer = PAIRS[kind][0](list(model.values()), **options)
    steps(optimizer, list(model.values()), range(2))
    twin.load_state_dict(model.state_dict())
    other = PAIRS[kind][0](list(twin.values())[::-1], **options)
    # Copied, as both would work on the same tensors otherwise, with torch's optimizers too.
    set_optimizer_state_dict(twin, other, copy.deepcopy(get_optimizer_state_dict(model, optimizer)))
    # torch makes the state to fill by a step at the rate zero.
    assert_same(list(model.values()), list(twin.values()))
    steps(optimizer, list(model.values()), range(2, 4))
    steps(other, list(twin.values()), range(2, 4))
    assert_same(list(model.values()), list(twin.values()))


def test_a_state_without_momentum_goes_through_a_distributed_checkpoint() -> None:
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    model = torch.nn.ParameterDict({"a": parameter(12, 4), "b": torch.randn(5, dtype=torch.float64)})
    optimizer = RiemannianSGD(list(model.values()), lr=0.1)
    model["a"].grad = torch.full((12, 4), torch.nan, dtype=torch.float64)
    model["b"].grad = torch.ones(5, dtype=torch.float64)
    optimizer.step()
    state = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    other = RiemannianSGD(list(model.values()), lr=0.1)
    set_optimizer_state_dict(model, other, state)
    assert other.skipped_updates == 1


def test_a_parameter_may_get_another_shape() -> None:
    p = parameter(12, 4)
    optimizer = RiemannianAdam([p], lr=0.1)
    steps(optimizer, [p], range(1))
    p.data = stiefel.random_point(9, 4, dtype=torch.float64)
    before = p.detach().clone()
    p.grad = torch.randn(9, 4, dtype=torch.float64)
    with pytest.raises(InputError, match=r"state 'exp_avg' of a parameter of shape \(9, 4\) has shape \(12, 4\)"):
        optimizer.step()
    assert torch.equal(p.detach(), before)


@pytest.mark.parametrize("as_rate", [float, torch.tensor])
@pytest.mark.parametrize("kind", PAIRS)
def test_a_rate_of_zero_leaves_a_point_to_the_bit(kind: str, as_rate: Any) -> None:
    params = mixed(torch.float32)
    before = copies(params)
    optimizer = PAIRS[kind][0](params, **{**COMMON[kind], "lr": as_rate(0.0)})
    steps(optimizer, params, range(3))
    assert_same(params, before)
    twin = PAIRS[kind][0](before, **COMMON[kind])
    for group in optimizer.param_groups:
        group["lr"] = COMMON[kind]["lr"]
    steps(optimizer, params, range(3, 4))
    set_grads(before, 3)
    twin.step()
    # The momentum has been gathered all the while.
    assert float((params[0] - before[0]).detach().norm()) > 1e-3


@pytest.mark.parametrize("kind", PAIRS)
def test_a_sparse_gradient_is_named_also_where_nonfinite_ones_are_errors(kind: str) -> None:
    p = parameter(12, 4)
    optimizer = PAIRS[kind][0]([p], error_if_nonfinite=True, **COMMON[kind])
    p.grad = torch.randn(12, 4, dtype=torch.float64).to_sparse()
    with pytest.raises(InputError, match="must be dense"):
        optimizer.step()


@pytest.mark.parametrize("kind", PAIRS)
def test_stabilizing_keeps_the_digits_of_a_master_copy(kind: str) -> None:
    p = parameter(64, 8, dtype=torch.bfloat16)
    optimizer = PAIRS[kind][0]([p], **COMMON[kind])
    steps(optimizer, [p], range(5))
    master = optimizer.state[p]["master"].clone()
    optimizer.stabilize()
    # float32 rounding of a projection; bf16 has 4e-3.
    torch.testing.assert_close(optimizer.state[p]["master"], master, rtol=0, atol=1e-6)
    assert torch.equal(p.detach().as_subclass(Tensor), optimizer.state[p]["master"].to(torch.bfloat16))
    # What someone else has written counts.
    with torch.no_grad():
        p.copy_(stiefel.random_point(64, 8, dtype=torch.bfloat16))
    written = p.detach().clone()
    optimizer.stabilize()
    torch.testing.assert_close(optimizer.state[p]["master"], written.float().as_subclass(Tensor), rtol=0, atol=2e-2)
    assert float(stiefel.orthogonality_error(optimizer.state[p]["master"])) < 5e-6


@pytest.mark.parametrize("kind", PAIRS)
def test_foreign_state_is_refused(kind: str) -> None:
    params = mixed()
    optimizer = PAIRS[kind][0](params, **COMMON[kind])
    steps(optimizer, params, range(2))
    before = copies(params)
    saved = copy.deepcopy(optimizer.state_dict())
    key = {"adam": "exp_avg", "sgd": "momentum_buffer"}[kind]
    saved["state"][0][key] = torch.zeros(9, 2)
    optimizer.load_state_dict(saved)
    with pytest.raises(InputError, match=rf"{key}.* has shape \(9, 2\), expected \(12, 4\)"):
        steps(optimizer, params, range(2, 3))
    assert_same(params, before)


# -- the rest of the machinery -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PAIRS)
def test_closure_runs_with_gradients_and_its_loss_comes_back(kind: str) -> None:
    p = parameter(12, 4)
    target = torch.randn(12, 4, dtype=torch.float64)
    optimizer = PAIRS[kind][0]([p], **COMMON[kind])

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = -(p * target).sum()
        loss.backward()
        return loss

    first = optimizer.step(closure)
    assert isinstance(first, Tensor)
    for _ in range(20):
        last = optimizer.step(closure)
    assert float(last.detach()) < float(first.detach()) - 1


@pytest.mark.parametrize("kind", PAIRS)
def test_schedulers_set_the_step(kind: str) -> None:
    params, twins = [parameter(12, 4)], []
    twins = copies(params)
    optimizer = PAIRS[kind][0](params, **COMMON[kind])
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    manual = PAIRS[kind][0](twins, **COMMON[kind])
    for seed in range(4):
        set_grads(params, seed)
        set_grads(twins, seed)
        optimizer.step()
        scheduler.step()
        manual.step()
        manual.param_groups[0]["lr"] *= 0.5
    assert_same(params, twins)


@pytest.mark.parametrize("kind", PAIRS)
def test_one_cycle_scheduler(kind: str) -> None:
    p = parameter(12, 4)
    optimizer = PAIRS[kind][0]([p], **COMMON[kind])
    (twin,) = copies([p])
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=6)
    cycled = ("lr", "momentum") if kind == "sgd" else ("lr", "betas")
    by_hand = PAIRS[kind][0]([twin], **COMMON[kind])
    seen = set()
    for seed in range(5):
        options = {name: optimizer.param_groups[0][name] for name in cycled}
        seen.add(str(options))
        set_grads([p], seed)
        optimizer.step()
        scheduler.step()
        by_hand.param_groups[0].update(options)
        set_grads([twin], seed)
        by_hand.step()
    assert len(seen) == 5, "the scheduler changes both at every step"
    assert_same([p], [twin])


@pytest.mark.parametrize("kind", PAIRS)
def test_momentum_may_be_switched_on_later(kind: str) -> None:
    """An option that adds a buffer to the state of a running optimizer."""
    p = parameter(12, 4)
    optimizer = RiemannianSGD([p], lr=0.05) if kind == "sgd" else RiemannianAdam([p])
    steps(optimizer, [p], range(2))
    optimizer.param_groups[0]["momentum" if kind == "sgd" else "amsgrad"] = 0.9 if kind == "sgd" else True
    steps(optimizer, [p], range(2, 4))
    assert ("momentum_buffer" if kind == "sgd" else "max_exp_avg_sq") in optimizer.state[p]


@pytest.mark.parametrize("kind", PAIRS)
def test_tensor_learning_rate_is_the_float_one(kind: str) -> None:
    params = mixed()
    twins = copies(params)
    steps(
        PAIRS[kind][0](params, **{**COMMON[kind], "lr": torch.tensor(0.05, dtype=torch.float64)}, foreach=False),
        params,
        range(3),
    )
    steps(PAIRS[kind][0](twins, **COMMON[kind], foreach=False), twins, range(3))
    assert_same(params, twins)


@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize("fused", [False, True])
def test_grad_scaler(kind: str, fused: bool) -> None:
    """Scaled gradients are unscaled for both kinds of parameter, and a step with an infinity is left out."""
    params = mixed(torch.float32)
    twins = copies(params)
    optimizer = PAIRS[kind][0](params, **COMMON[kind], fused=fused)
    plain = PAIRS[kind][0](twins, **COMMON[kind], fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for seed in range(4):
        set_grads(params, seed)
        set_grads(twins, seed)
        with torch.no_grad():
            for p in params:
                p.grad *= scaler.get_scale()
        if seed == 2:
            params[1].grad[0] = torch.inf
        scaler.scale(torch.ones(()))
        scaler.step(optimizer)
        scaler.update()
        if seed != 2:
            plain.step()
    for p, q in zip(params, twins, strict=True):
        # The scale is a power of two, so only the order of roundings in the moments differs.
        torch.testing.assert_close(p.detach(), q.detach(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", PAIRS)
def test_clipping_and_accumulation(kind: str) -> None:
    p = parameter(12, 4)
    q = copies([p])[0]
    data = torch.randn(4, 12, 4, dtype=torch.float64)
    for param, batches in ((p, data.split(1)), (q, [data])):
        optimizer = PAIRS[kind][0]([param], **COMMON[kind])
        for batch in batches:
            (param * batch).sum().backward()
        torch.nn.utils.clip_grad_norm_([param], 1.0)
        optimizer.step()
    # The four gradients are summed in another order.
    torch.testing.assert_close(p.detach(), q.detach(), atol=1e-13, rtol=0)


@pytest.mark.parametrize("kind", PAIRS)
def test_hooks_run_once_a_step(kind: str) -> None:
    """Also when torch has patched the step of its own AdamW or SGD class, which happens at their first instance."""
    PAIRS[kind][1]([torch.nn.Parameter(torch.ones(1))])
    params = mixed()
    optimizer = PAIRS[kind][0](params, **COMMON[kind])
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    # Hooks on all optimizers see one step of one optimizer, and so does the profiler.
    with (
        register_optimizer_step_pre_hook(lambda o, *_: calls.append(type(o).__name__)),
        register_optimizer_step_post_hook(lambda o, *_: calls.append(type(o).__name__)),
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile,
    ):
        steps(optimizer, params, range(2))
    name = type(optimizer).__name__
    assert calls == [name, "pre", "post", name] * 2
    assert [e.name for e in profile.events() if "Optimizer.step" in e.name] == [f"Optimizer.step#{name}.step"] * 2


@pytest.mark.parametrize("kind", PAIRS)
def test_only_ordinary_or_only_manifold_parameters(kind: str) -> None:
    for params in ([torch.nn.Parameter(torch.ones(3))], [parameter(12, 4)]):
        before = copies(params)
        steps(PAIRS[kind][0](params, **COMMON[kind]), params, range(1))
        assert not torch.equal(params[0].detach(), before[0].detach())
    with pytest.raises(ValueError, match="empty parameter list"):
        PAIRS[kind][0]([])


@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize("manifold", [geoopt.EuclideanStiefel(), geoopt.Sphere()])
def test_sparse_gradients_are_refused_before_anything_changes(kind: str, manifold: geoopt.Manifold) -> None:
    late = geoopt.ManifoldParameter(torch.eye(4, dtype=torch.float64), manifold=manifold)
    params = [*mixed(), late]
    before = copies(params)
    optimizer = PAIRS[kind][0](params, **COMMON[kind])
    set_grads(params, 0)
    late.grad = torch.eye(4, dtype=torch.float64).to_sparse()
    with pytest.raises(InputError, match=r"shape \(4, 4\) must be dense"):
        optimizer.step()
    assert_same(params, before)
    assert not optimizer.state


@pytest.mark.skipif(not hasattr(Tensor, "grad_dtype"), reason="this torch wants gradients of the parameter's dtype")
@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("kind", PAIRS)
def test_gradients_of_a_lower_precision_are_taken(kind: str, count: int) -> None:
    params: list[Tensor] = [parameter(12, 4, dtype=torch.float32) for _ in range(count)]
    twins = copies(params)
    for p, q in zip(params, twins, strict=True):
        p.grad_dtype = torch.bfloat16  # type: ignore[attr-defined]
        p.grad = torch.randn(12, 4, dtype=torch.bfloat16)
        q.grad = p.grad.float()
    for ps in (params, twins):
        PAIRS[kind][0](ps, **COMMON[kind]).step()
    for p, q in zip(params, twins, strict=True):
        # A batch and a matrix alone round in another order.
        torch.testing.assert_close(p.detach().as_subclass(Tensor), q.detach().as_subclass(Tensor), atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", PAIRS)
def test_moving_the_model_to_another_dtype_in_mid_run(kind: str) -> None:
    p = parameter(12, 4, dtype=torch.float32)
    optimizer = PAIRS[kind][0]([p], **COMMON[kind])
    steps(optimizer, [p], range(2))
    p.grad = None
    p.data = p.data.bfloat16()
    steps(optimizer, [p], range(2, 4))
    state = optimizer.state[p]
    assert state["master"].dtype == torch.float32
    assert float(stiefel.orthogonality_error(state["master"])) < 5e-6


def forbid_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the optimizers take the path of devices on which reading a number waits."""
    for module in (_base, _batch, stiefel):
        monkeypatch.setattr(module, "reads_at_no_cost", lambda _: False)


@pytest.mark.parametrize("kind", PAIRS)
def test_a_step_that_does_not_look_whether_all_gradients_are_finite_is_the_same(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeing = [parameter(12, 4), parameter(12, 4), parameter(9, 2)]
    blind = copies(seeing)
    steps(PAIRS[kind][0](seeing, **COMMON[kind]), seeing, range(5))
    forbid_reading(monkeypatch)
    steps(PAIRS[kind][0](blind, **COMMON[kind]), blind, range(5))
    for a, b in zip(seeing, blind, strict=True):
        # The same formulas, rounded in another order.
        torch.testing.assert_close(a.detach().as_subclass(Tensor), b.detach().as_subclass(Tensor), atol=1e-13, rtol=0)


class NothingIsRead(TorchDispatchMode):
    """Refuses to give a number of a tensor to the host, whoever asks, in Python or beneath."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            pytest.fail("a number is read in step()")
        return func(*args, **(kwargs or {}))


def test_no_host_synchronisation_in_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """No number is read from a tensor of the manifold part: what would wait for the device on an accelerator."""
    forbid_reading(monkeypatch)
    params = [parameter(12, 4), parameter(12, 4), parameter(9, 2)]
    for retraction in ("qr", "cayley", "polar"):
        for optimizer in (
            RiemannianAdam(params, lr=0.05, retraction=retraction, amsgrad=True),
            RiemannianSGD(params, lr=0.05, momentum=0.9, retraction=retraction),
        ):
            steps(optimizer, params, range(1))
            set_grads(params, 1)
            with monkeypatch.context() as patch:
                for name in ("item", "tolist", "__bool__", "__float__", "__int__", "__index__", "cpu", "numpy"):
                    patch.setattr(Tensor, name, lambda *_, name=name: pytest.fail(f"Tensor.{name} in step()"))
                with NothingIsRead():
                    optimizer.step()


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("kind", PAIRS)
def test_a_compiled_step_is_the_step(kind: str, whole: bool) -> None:
    model = torch.nn.ParameterDict({"a": parameter(12, 4), "b": torch.randn(5, dtype=torch.float64)})
    twin = copy.deepcopy(model)

    def run(params: torch.nn.ParameterDict, compiled: bool) -> None:
        optimizer = PAIRS[kind][0](list(params.values()), **COMMON[kind])

        def train(x: Tensor) -> None:
            ((x @ params["a"]).square().sum() + params["b"].square().sum()).backward()
            if whole:
                optimizer.step()

        compile_ = functools.partial(torch.compile, backend="eager") if compiled else lambda function: function
        part, step = compile_(train), compile_(optimizer.step)
        for seed in range(3):
            part(torch.randn(3, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)))
            if not whole:
                step()
            optimizer.zero_grad()

    run(model, compiled=False)
    run(twin, compiled=True)
    assert_same(list(model.values()), list(twin.values()))
