"""A tiny random LLaMA with a real tokenizer, saved to a folder: what every command can load."""

import json
from pathlib import Path

import torch

from stiefel_lora.config import FinetuneConfig

TEXT = "\n".join(f"def add_{i}(left, right):\n    total = left + right + {i}\n    return total\n" for i in range(120))


def save_tiny_model(folder: Path, *, layers: int = 4) -> Path:
    """Train a byte-pair tokenizer on TEXT, build a model of a few thousand weights, and save both."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)  # noqa: S106
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        eos_token_id=0,
        bos_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def save_tiny_gguf(folder: Path) -> Path:
    """Save the tiny model with its tokenizer as a GGUF file, as llama.cpp's converter writes one."""
    import gguf
    from transformers import AutoTokenizer, LlamaForCausalLM

    save_tiny_model(folder)
    model, tokenizer = LlamaForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    config, arch = model.config, gguf.MODEL_ARCH.LLAMA
    path = folder / "model.gguf"
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch])
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    made = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(sorted(made["vocab"], key=made["vocab"].__getitem__))
    writer.add_token_merges([" ".join(pair) for pair in made["merges"]])
    writer.add_bos_token_id(config.bos_token_id)
    writer.add_eos_token_id(config.eos_token_id)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, weight in model.state_dict().items():
        count = heads.get(name.split(".")[-2])
        if count:  # llama.cpp rotates neighbouring entries of a head, transformers its two halves
            weight = weight.view(count, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
        writer.add_tensor(names.get_name(name, (".weight",)), weight.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tiny_run(folder: Path) -> FinetuneConfig:
    """Put a tiny model and data into a folder and return the configuration of a short run on them."""
    (folder / "text.py").write_text(TEXT)
    return FinetuneConfig(
        model=str(save_tiny_model(folder / "model")),
        data=str(folder / "text.py"),
        rank=4,
        calibration_samples=6,
        steps=9,
        batch_size=2,
        seq_len=32,
        warmup=2,
        lr=1e-2,
        eval_samples=6,
        dropout=0.1,
    )


def write_jsonl(path: Path, records: list[object]) -> Path:
    """Write one JSON value a line."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path
