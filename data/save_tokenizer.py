"""Writes a tokenizer as a Hugging Face folder: `python -m moexpand.data.save_tokenizer qwen-science FOLDER`."""

import sys
from pathlib import Path

from moexpand.base.errors import DONE, WRONG_INPUT, MoexpandError
from moexpand.base.files import new_folder
from moexpand.data.tokens import load_tokenizer


def main(words: list[str]) -> int:
    """Write the tokenizer words[0] into the new folder words[1]; returns an exit code (base/errors.py)."""
    if len(words) != 2:
        print("python -m moexpand.data.save_tokenizer TOKENIZER FOLDER", file=sys.stderr)
        return WRONG_INPUT
    try:
        tokenizer = load_tokenizer(words[0])
        with new_folder(Path(words[1])) as building:
            tokenizer.save(building)
    except MoexpandError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(f"Wrote {words[0]} to {words[1]}; a model for it has vocab_size={tokenizer.vocab_size}.")
    return DONE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
