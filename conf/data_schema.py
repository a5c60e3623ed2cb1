"""Keys of the `moexpand data ...` commands, and the `data` keys of a training run."""

from dataclasses import dataclass

from omegaconf import MISSING

from moexpand.conf.fields import key, part, words

TOKENIZERS = "qwen, qwen-8192, qwen-science, qwen-8192-science or a Hugging Face folder"

# ---------------------------------------------------------------- training


@dataclass
class Pictures:
    """How pictures reach a model with a vision tower."""

    images: str = key("auto", "auto: pictures are read where the model has a tower; off: their text alone", ("auto", "off"))
    min_pixels: int | None = key(None, "smallest area of a resized picture; not given: the checkpoint's own", within="[1, inf)")
    max_pixels: int | None = key(None, "largest area of a resized picture; not given: the checkpoint's own", within="[1, inf)")


@dataclass
class Seen(Pictures):
    """Pictures, and time series."""

    time_series: str = key(
        "auto", "auto: time series are read where the model has an encoder; off: their text alone", ("auto", "off")
    )


@dataclass
class CalibrateData(Seen):
    shards: str = key(MISSING, "folder written by `moexpand data build`")
    tokenizer: str | None = key(None, TOKENIZERS + "; not given: the one the shards were indexed with")


@dataclass
class Data(Seen):
    shards: str = key(MISSING, "folder or address written by `moexpand data build` or `data index`, or a YAML file of several")
    tokenizer: str | None = key(None, TOKENIZERS + "; not given: the one the shards were indexed with")
    held_out: float = key(0.05, "fraction of the samples kept for evaluation", within="[0, 1)")
    max_bad_fraction: float = key(0.0, "largest fraction of unreadable samples before the run stops", within="[0, 1]")
    shuffle: str = key("samples", "samples: over everything; shards: whole shards (for remote storage)", ("samples", "shards"))
    workers: int = key(0, "processes that read ahead; 0 reads in the training process", within="[0, inf)")
    cache: str | None = key(None, "local folder into which remote shards are copied before they are read")
    cache_gb: float = key(64.0, "how much the cache may hold", within="(0, inf)")


# ---------------------------------------------------------------- data build


@dataclass
class Filters:
    min_characters: int = key(200, "shortest running text", within="[0, inf)")
    max_symbol_ratio: float = key(0.4, "largest fraction of characters that are neither letters nor spaces", within="[0, 1]")
    max_repetition: float = key(0.5, "largest fraction of a text that repeats its own lines", within="[0, 1]")
    max_ngram_repetition: float = key(0.8, "largest fraction of a text in runs of five words that repeat", within="[0, 1]")
    min_figure_points: float = key(36.0, "smallest side of a figure, in PDF points", within="[0, inf)")
    min_ink: float = key(1.0, "smallest standard deviation of a picture's grey levels (0 to 255)", within="[0, inf)")
    languages: list[str] = words("ISO 639 codes to keep, such as [en,zh]; empty keeps all")
    min_language_probability: float = key(0.0, "smallest probability of a text's language", within="[0, 1]")
    min_agreement: float = key(0.0, "smallest share of a caption's numbers and words found in its figure", within="[0, 1]")
    min_score: float | None = key(None, "smallest value of the scoring model (scorer.url)", within="[0, 1]")
    text_similarity: float | None = key(0.8, "texts that share this part of their runs of five words are one; null: off")
    image_distance: int | None = key(10, "pictures whose 256-bit hashes differ in at most so many bits are one; null: off")


@dataclass
class Captioner:
    url: str | None = key(None, "base address of an OpenAI-compatible endpoint, /v1 included; not given: no model is asked")
    model: str | None = key(None, "its model")
    scientific_url: str | None = key(None, "another endpoint for scientific pictures")
    scientific_model: str | None = key(None, "its model")
    scientific_pattern: str = key("", "regular expression that makes a caption scientific; not given: the built-in rules")
    templates: list[str] = words("names of the prompt templates to pick from; empty: all built-in ones")
    include_context: bool = key(True, "quote the document's caption and the paragraphs that mention the picture")
    max_tokens: int = key(512, "longest answer", within="[1, inf)")
    temperature: float = key(0.2, "sampling temperature", within="[0, 5]")
    concurrency: int = key(32, "requests at a time to one address", within="[1, 4096]")
    timeout_seconds: float = key(120.0, "longest wait for an answer", within="(0, inf)")
    retries: int = key(6, "further tries after a failure that may pass", within="[0, 100]")
    max_failure_fraction: float = key(0.05, "largest fraction of pictures without an answer", within="[0, 1]")
    retry_failed: bool = key(False, "ask again where an earlier answer was judged bad")
    api_key_env: str = key("OPENAI_API_KEY", "environment variable that holds the key, of the scorer too")


@dataclass
class Scorer:
    url: str | None = key(None, "base address of an OpenAI-compatible endpoint that judges texts; not given: none is asked")
    model: str | None = key(None, "its model")
    prompt: str | None = key(None, "prompt with {text} where the text goes; not given: the built-in one")
    characters: int = key(8000, "characters of a text that are judged", within="[1, inf)")


@dataclass
class Chat:
    template: str | None = key(None, "jinja file or Hugging Face folder with the chat template; not given: the tokenizer's")
    enable_thinking: bool | None = key(None, "passed to the chat template where a conversation does not say")
    history: str = key(
        "split", "answers that the whole conversation shows otherwise: samples of their own, or none", ("split", "last")
    )
    date: str = key("2025-01-01", "today, for templates that write it")


@dataclass
class DataBuildCommand:
    """Turn PDFs and other sources into shards."""

    pdfs: str | None = key(None, "folder of PDF files")
    sources: list[str] = words(
        "jsonl, CSV, parquet and text files, output of MinerU or docling, captioned pictures, and folders of them"
    )
    out: str = key(MISSING, "folder to write; must not exist; a build that was stopped goes on")
    workers: int = key(0, "processes; 0 takes one a core", within="[0, inf)")
    tokenizer: str = key("qwen", TOKENIZERS)
    shard_samples: int = key(512, "samples of a tar file", within="[1, inf)")
    sample_characters: int = key(6000, "a text sample is cut at the paragraph that passes this length", within="[1, inf)")
    text_key: str = key("text", "column of jsonl, CSV and parquet that holds text")
    templates: str | None = key(None, "YAML or JSON file of templates for rows without text")
    template: str | None = key(None, "which of them to fill, where there are several")
    seed: int = key(0, "picks templates of rows and of prompts", within="[0, 2147483646]")
    image_dpi: int = key(144, "resolution of cropped figures", within="[1, inf)")
    equations: bool = key(False, "crop numbered equations of PDFs too")
    pdf_seconds: float = key(120.0, "longest time for one PDF", within="(0, inf)")
    filters: Filters = part(Filters, "thresholds; every dropped sample is counted under its reason")
    captioner: Captioner = part(Captioner, "models that describe pictures")
    scorer: Scorer = part(Scorer, "a model that judges texts")
    chat: Chat = part(Chat, "how conversations are written")
    answers: str | None = key(None, "folder that keeps the models' answers; not given: .OUT.answers beside the target")
    plain: bool = key(False, "plain lines even on a terminal")
    debug: bool = key(False, "print tracebacks")


@dataclass
class DataIndexCommand:
    """Index webdataset or energon tars in place."""

    shards: str = key(MISSING, "folder of tars")
    tokenizer: str = key("qwen", TOKENIZERS)
    text_key: str = key("text", "key of the .json members that holds the text, in samples without a .txt member")
    workers: int = key(0, "processes; 0 takes one a core", within="[0, inf)")
    max_bad_fraction: float = key(0.0, "largest fraction of samples that may be unusable", within="[0, 1]")
    debug: bool = key(False, "print tracebacks")


@dataclass
class DataInspectCommand:
    """Show what a shard folder holds, what was dropped and why."""

    shards: str = key(MISSING, "folder or address of shards")
    format: str = key("table", "table or json", ("table", "json"))
    sheet: str | None = key(None, "HTML file to write, a contact sheet of pictures with their captions")
    sheet_samples: int = key(200, "pictures on the sheet", within="[1, inf)")
    debug: bool = key(False, "print tracebacks")
