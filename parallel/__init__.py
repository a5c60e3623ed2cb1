"""Everything that knows ranks, with every Megatron-Core object behind a small interface."""

import logging
import warnings

# Megatron-Core warns of every optional library that is absent and of older torch names that it calls: nothing to mend here.
warnings.filterwarnings("ignore", module=r"megatron\..*")
warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\..*")
# It does not know our layer by name and says so once a layer; it is built as its own.
logging.getLogger("megatron.core.transformer.transformer_layer").setLevel(logging.ERROR)
