"""Qwen's vocabulary with pieces of SMILES, proteins and nucleic acids beside it, and the folder that it is saved as.

Ids of the full vocabulary: 151,643 ranks of Qwen and its 26 special tokens, 25 further ones, 1,024 for each domain (SMILES from
151,694, PROT from 152,718, XNA from 153,742), rows without a token up to 155,008. Offsets, size and the three time-series tokens
are those of Intern-S1-Pro, and it has the opening tags; the other special tokens' ids are not known here: `SPECIALS` is ours.
"""

import re
from pathlib import Path

from moexpand.base.files import read_json, write_json
from moexpand.data.spans import Base, Domain, SpanTokenizer

SPECIALS = (
    "<SMILES>",
    "</SMILES>",
    "<protein>",
    "</protein>",
    "<dna>",
    "</dna>",
    "<rna>",
    "</rna>",
    "<|interpreter|>",
    "<|plugin|>",
    *(f"<|reserved_{number}|>" for number in range(4)),
    "<|ts|>",
    "<|/ts|>",
    "<TS_CONTEXT>",
    *(f"<|reserved_{number}|>" for number in range(4, 12)),
)
"""Ids right after Qwen's own."""
DOMAINS = ("SMILES", "PROT", "XNA")
DOMAIN_IDS = 1024
MODELS = Path(__file__).parent / "science"
CODE = "tokenization_spans_moexpand.py"


class ScienceTokenizer(SpanTokenizer):
    """A Qwen vocabulary that holds `SPECIALS`, and the three domains right after its last token."""

    def __init__(self, base: Base, vocab_size: int) -> None:
        first = max(base.vocabulary.values()) + 1
        files = [MODELS / f"{name}.model" for name in DOMAINS]
        domains = [
            Domain(name, file.read_bytes(), first + number * DOMAIN_IDS, str(file))
            for number, (name, file) in enumerate(zip(DOMAINS, files, strict=True))
        ]
        super().__init__(base, domains, vocab_size=vocab_size)

    def save(self, folder: Path) -> None:
        """See `tokens.Tokenizer.save`; the folder carries the code with which transformers reads spans too."""
        super().save(folder)
        code = (MODELS / CODE).read_text(encoding="utf-8")
        for domain in self.domains:
            code = re.sub(rf"(sp_model_{domain.name}\.offset = )\d+", rf"\g<1>{domain.offset}", code)
        (Path(folder) / CODE).write_text(code, encoding="utf-8")
        config = read_json(Path(folder) / "tokenizer_config.json")
        name = f"{CODE.removesuffix('.py')}.SpanTokenizer"
        changed = {"tokenizer_class": "SpanTokenizer", "auto_map": {"AutoTokenizer": [name, None]}}
        write_json(Path(folder) / "tokenizer_config.json", config | changed)
