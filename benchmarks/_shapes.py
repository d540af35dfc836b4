"""Shapes of the factors of LoRA on real models."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Model:
    """The adapted linears of a LLaMA-like model: q, k, v, up and down of each layer.

    Attributes:
        name: The model's name.
        hidden: Hidden size.
        query: Output size of q_proj.
        key_value: Output size of k_proj and v_proj.
        intermediate: Size inside the MLP.
        layers: Number of decoder layers.
        rank: Rank of the adapters.
        head: Size of an attention head.
        vocabulary: Number of tokens.
    """

    name: str
    hidden: int
    query: int
    key_value: int
    intermediate: int
    layers: int
    rank: int
    head: int
    vocabulary: int

    def down(self) -> list[tuple[int, int]]:
        """Return the shapes (in_features, rank) of all lora_A."""
        return [(n, self.rank) for n in [self.hidden] * 4 + [self.intermediate]] * self.layers

    def up(self) -> list[tuple[int, int]]:
        """Return the shapes (out_features, rank) of all lora_B."""
        sizes = [self.query, self.key_value, self.key_value, self.intermediate, self.hidden]
        return [(n, self.rank) for n in sizes] * self.layers


MODELS = {
    model.name: model
    for model in (
        Model("SmolLM2-135M", 576, 576, 192, 1536, 30, 16, 64, 49152),
        Model("LLaMA-3.2-1B", 2048, 2048, 512, 8192, 16, 32, 64, 128256),
        Model("LLaMA-3.1-8B", 4096, 4096, 1024, 14336, 32, 32, 128, 128256),
        Model("Qwen3-8B", 4096, 4096, 1024, 12288, 36, 32, 128, 151936),
    )
}
