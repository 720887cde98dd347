"""A CLIP of a few channels with drawn weights, in the three files that users have of a real one."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

MERGES = [("c", "a"), ("ca", "t</w>"), ("d", "o"), ("do", "g</w>"), ("r", "e"), ("re", "d</w>")]
START, END = "<|startoftext|>", "<|endoftext|>"


def tokenizer() -> Any:
    """CLIP's tokeniser with few words: 256 bytes, alone and at a word's end, six merges, start and end."""
    import tokenizers
    from tokenizers import models, normalizers, pre_tokenizers, processors

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*letters, *(f"{letter}</w>" for letter in letters), *(a + b for a, b in MERGES), START, END]
    ids = {word: i for i, word in enumerate(words)}
    made = tokenizers.Tokenizer(models.BPE(ids, MERGES, unk_token=END, end_of_word_suffix="</w>"))
    made.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(tokenizers.Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    pattern = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(pattern), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    made.post_processor = processors.RobertaProcessing((END, ids[END]), (START, ids[START]), False, False)
    made.add_special_tokens([START, END])
    return made


WORDS = 2 * 256 + len(MERGES) + 2
EOS = WORDS - 1


def config(activation: str = "quick_gelu", eos: int = EOS) -> dict[str, Any]:
    """Widths that all differ, an ε of each tower that can be seen, a last row of pixels that is in no patch."""
    text = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 3}
    text |= {"vocab_size": WORDS, "max_position_embeddings": 13, "layer_norm_eps": 1e-2, "eos_token_id": eos}
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    vision |= {"image_size": 25, "patch_size": 8, "layer_norm_eps": 2e-2}
    parts = {f"{kind}_config": part | {"hidden_act": activation} for kind, part in (("text", text), ("vision", vision))}
    return {"model_type": "clip", "projection_dim": 20, **parts}


def drawn(config: dict[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    """Weights under transformers' names, every one of them of consequence."""
    rng, arrays = np.random.default_rng(seed), {}

    def linear(name: str, c_in: int, c_out: int) -> None:
        arrays[f"{name}.weight"] = rng.normal(0, 1.2 / np.sqrt(c_in), (c_out, c_in))
        arrays[f"{name}.bias"] = rng.normal(0, 0.3, c_out)

    def norm(name: str, width: int) -> None:
        arrays[f"{name}.weight"] = rng.uniform(0.5, 1.5, width)
        arrays[f"{name}.bias"] = rng.normal(0, 0.3, width)

    for kind, norms in (("text", ("final_layer_norm",)), ("vision", ("pre_layrnorm", "post_layernorm"))):
        tower = config[f"{kind}_config"]
        width, wide = tower["hidden_size"], tower["intermediate_size"]
        for i in range(tower["num_hidden_layers"]):
            name = f"{kind}_model.encoder.layers.{i}"
            for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
                linear(f"{name}.self_attn.{part}", width, width)
            linear(f"{name}.mlp.fc1", width, wide)
            linear(f"{name}.mlp.fc2", wide, width)
            norm(f"{name}.layer_norm1", width)
            norm(f"{name}.layer_norm2", width)
        for each in norms:
            norm(f"{kind}_model.{each}", width)
        shared = "text_projection" if kind == "text" else "visual_projection"
        arrays[f"{shared}.weight"] = rng.normal(0, width**-0.5, (config["projection_dim"], width))
        if kind == "text":
            shapes = {"token": tower["vocab_size"], "position": tower["max_position_embeddings"]}
        else:
            shapes = {"position": (tower["image_size"] // tower["patch_size"]) ** 2 + 1}
            patch = (width, 3, tower["patch_size"], tower["patch_size"])
            arrays["vision_model.embeddings.patch_embedding.weight"] = rng.normal(0, np.prod(patch[1:]) ** -0.5, patch)
            arrays["vision_model.embeddings.class_embedding"] = rng.normal(0, 1, width)
        for what, count in shapes.items():
            arrays[f"{kind}_model.embeddings.{what}_embedding.weight"] = rng.normal(0, 1, (count, width))
    arrays["logit_scale"] = np.array(2.6592)
    return {name: array.astype(np.float32) for name, array in arrays.items()}


def write(folder: Path, config: dict[str, Any], arrays: dict[str, np.ndarray] | None = None) -> Path:
    """The folder, with the three files in it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(drawn(config) if arrays is None else arrays, folder / "model.safetensors", {"format": "pt"})
    tokenizer().save(str(folder / "tokenizer.json"))
    return folder
