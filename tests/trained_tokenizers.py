"""Small real tokenizers, trained here, and folders that hold them."""

import json
import shutil
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

TEXTS = [
    "The router sends every token to the experts of its groups, and the experts answer.",
    "Der Router schickt jedes Token zu den Experten; größere Modelle wachsen aus kleineren.",
    "专家 混合 模型 の 語彙 は 移動 する",
]
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def byte_level(vocab_size: int, texts: list[str] = TEXTS, specials: list[str] = SPECIALS) -> Tokenizer:
    """A byte-level BPE in the form of Qwen's, trained here."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer.add_special_tokens(specials)
    return tokenizer


def saved(tokenizer: Tokenizer, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def permuted(tokenizer: Tokenizer, extra: tuple[str, ...] = ()) -> Tokenizer:
    """The same tokens and `extra` ones under other ids: special tokens first, the rest shuffled."""
    content = json.loads(tokenizer.to_str())
    vocab = list(content["model"]["vocab"])
    specials = [*extra, *(token["content"] for token in reversed(content["added_tokens"]))]
    ids = np.random.default_rng(0).permutation(len(vocab)) + len(specials)
    content["model"]["vocab"] = dict(zip(specials + vocab, [*range(len(specials)), *ids.tolist()], strict=True))
    blank = content["added_tokens"][0]
    content["added_tokens"] = [blank | {"id": number, "content": special} for number, special in enumerate(specials)]
    return Tokenizer.from_str(json.dumps(content))


def sentencepiece_model(file: Path, pieces: list[str]) -> None:
    from transformers.utils import sentencepiece_model_pb2_new as protocol

    model = protocol.ModelProto()
    for piece in ["<unk>", *pieces]:
        kind = "UNKNOWN" if piece == "<unk>" else "NORMAL"
        model.pieces.add(piece=piece, score=-1.5, type=protocol.ModelProto.SentencePiece.Type.Value(kind))
    model.trainer_spec.model_type = protocol.TrainerSpec.ModelType.Value("BPE")
    file.write_bytes(model.SerializeToString())


def domain_tokenizer(base: Path, folder: Path, domains: dict[str, tuple[int, list[str]]]) -> Path:
    shutil.copytree(base, folder)
    for domain, (_, pieces) in domains.items():
        sentencepiece_model(folder / f"tokenizer_{domain}.model", pieces)
    lines = [f"        self.sp_model_{domain}.offset = {offset}\n" for domain, (offset, _) in domains.items()]
    (folder / "tokenization_interns1.py").write_text("raise SystemExit('never run')\n" + "".join(lines))
    return folder
