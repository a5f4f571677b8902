"""From a resolved model to modules: heads, seeds, precision, and what may be missing."""

from __future__ import annotations

import importlib.util
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltacontrol.experiments.models import fit
from deltacontrol.experiments.models.base import ResolvedModel
from deltacontrol.theory.errors import InputError, first_lines, unknown

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

MOST_CLASSES = 100_000
# Four bits (Dettmers et al., NeurIPS 2023: NF4 with double quantisation) and eight (Dettmers et
# al., NeurIPS 2022: LLM.int8) for the linear maps; float32 for all beside them.
QUANTISED = ("nf4", "int8")
_CLASSES = {
    "classification": "AutoModelForSequenceClassification",
    "regression": "AutoModelForSequenceClassification",
    "causal-lm": "AutoModelForCausalLM",
    "masked-lm": "AutoModelForMaskedLM",
    "backbone": "AutoModel",
}


def build(
    model: ResolvedModel,
    *,
    kind: str,
    num_labels: int | None,
    pretrained: bool,
    seed: int,
    dtype: str | torch.dtype,
    attn_implementation: str,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Build what `deltacontrol.experiments.models.load` describes."""
    import torch
    import transformers

    if kind not in _CLASSES:
        raise unknown("kind of model", kind, _CLASSES)
    bits = dtype if isinstance(dtype, str) and dtype in QUANTISED else None
    precision = torch.float32 if bits else dtype
    if isinstance(precision, str):
        precision = getattr(torch, precision, None)
    if not (isinstance(precision, torch.dtype) and precision.is_floating_point):
        floats = ["float32", "float64", "bfloat16", "float16"]
        raise unknown("dtype", str(dtype), [*floats, *QUANTISED])
    if model.digest is not None and (Path(model.location) / "adapter_config.json").is_file():
        raise InputError(
            f"the folder {model.location} holds an adapter of peft beside the model, which would "
            "be attached to it; move the adapter to a folder of its own and import it "
            "(`deltacontrol import-peft`)."
        )
    config, tokenizer = _config_and_tokenizer(model)
    given = getattr(config, "quantization_config", None)
    if given is not None and (bits or precision == torch.float64 or not pretrained):
        raise InputError(
            f"the weights of {model.name} are quantised already; expected dtype float32, bfloat16 "
            f"or float16 for what is beside them, and pretrained weights, got dtype {dtype} and "
            f"pretrained={pretrained}"
        )
    goal = getattr(config, "problem_type", None)  # of a file: it may hold anything
    _set_task(config, kind, num_labels, model.name)
    _set_padding(config, tokenizer, model.name)
    auto = getattr(transformers, _CLASSES[kind])
    architecture = _architecture(auto, config, kind, model.name)
    if attn_implementation == "sdpa" and not architecture._supports_sdpa:
        attn_implementation = "eager"
    options: dict[str, Any] = {
        "config": config,
        "attn_implementation": attn_implementation,
        # Drawing in float64 would give another head than drawing in float32.
        "dtype": torch.float32 if precision == torch.float64 else precision,
    }
    if bits:
        options |= _quantisation(bits, model.name, architecture, config, pretrained=pretrained)
    with _drawn_from(seed), _without_load_report():
        if pretrained:
            built = _from_checkpoint(auto, model, kind, goal, options)
        else:
            with _reading(model, "the model of its config.json"):
                built = auto.from_config(options.pop("config"), **options)
    if precision == torch.float64:
        built = built.double()
    return built.eval(), tokenizer


def language_kind(model: ResolvedModel) -> str:
    """As `fit.language_kind`, of a model that is not loaded."""
    from transformers import AutoConfig

    with _reading(model, "its config.json"):
        config = AutoConfig.from_pretrained(model.location, trust_remote_code=False)
    return fit.language_kind(config, model.name)


def _quantisation(
    bits: str,
    name: str,
    architecture: type[PreTrainedModel],
    config: PretrainedConfig,
    *,
    pretrained: bool,
) -> dict[str, Any]:
    """Options of `from_pretrained` that quantise the backbone's linear maps while it reads them."""
    import torch

    from deltacontrol.deltas.editing.sites import SiteMap

    if not pretrained:
        raise InputError(
            f"dtype {bits} quantises the weights of a checkpoint, and pretrained=False draws those "
            f"of {name}; take float32"
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise InputError(
            f"dtype {bits} needs bitsandbytes; install it: pip install 'deltacontrol[quantised]'"
        )
    from transformers import BitsAndBytesConfig

    # It tells of every cast of an input in every pass.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    with torch.device("meta"):
        heads = SiteMap(architecture(config)).head_paths()
    if bits == "int8":
        chosen = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=heads)
    else:
        chosen = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=bits,
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
            llm_int8_skip_modules=heads,
        )
    return {"quantization_config": chosen}


def _config_and_tokenizer(
    model: ResolvedModel,
) -> tuple[PretrainedConfig, PreTrainedTokenizerBase]:
    from transformers import AutoConfig, AutoTokenizer

    _check_num_labels(model)
    # Code that a model's folder or repository brings along is never run.
    with _reading(model, "its config.json"):
        config = AutoConfig.from_pretrained(model.location, trust_remote_code=False)
    _name_classes(config, model)
    with _reading(model, "its tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(model.location, trust_remote_code=False)
    if not tokenizer.is_fast:
        raise InputError(f"{model.name} has no fast tokenizer (a tokenizer.json is needed).")
    # Of a folder without a tokenizer's files, transformers makes one of the special tokens alone.
    added = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}
    if not any(word.strip("▁Ġ") for word in set(tokenizer.get_vocab()) - added):
        raise InputError(
            f"{model.name} has no tokenizer: no word is known but {tokenizer.all_special_tokens}. "
            "Save it beside the model, tokenizer.save_pretrained(folder)."
        )
    _refuse_unknown_quantisation(config, model.name)
    return config, tokenizer


def _refuse_unknown_quantisation(config: PretrainedConfig, name: str) -> None:
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    given = getattr(config, "quantization_config", None)
    if given is None:
        return
    method = given.get("quant_method") if isinstance(given, dict) else given.quant_method
    if method is None and isinstance(given, dict):
        bits = [n for n in (4, 8) if given.get(f"load_in_{n}bit")]
        method = f"bitsandbytes_{bits[0]}bit" if bits else None
    if str(method) not in AUTO_QUANTIZER_MAPPING and str(method) != "bitsandbytes":
        raise InputError(
            f"the weights of {name} are quantised by {method!r}, which transformers does not know; "
            f"known: {', '.join(sorted(AUTO_QUANTIZER_MAPPING))}"
        )


def _name_classes(config: PretrainedConfig, model: ResolvedModel) -> None:
    """Take names of classes from ``label2id`` where ``id2label`` is not there; refuse two answers.

    Raises:
        InputError: ``num_labels``, ``id2label`` and ``label2id`` of config.json contradict.
    """
    try:
        given = json.loads((Path(model.location) / "config.json").read_text("utf-8"))
        by_name = {int(i): str(name) for name, i in (given.get("label2id") or {}).items()}
        by_id = {int(i): str(name) for i, name in (given.get("id2label") or {}).items()}
        number = given.get("num_labels")
    except (OSError, ValueError, TypeError, AttributeError):
        return  # of the hub, or refused where it is read
    names = by_id or by_name
    if names and sorted(names) != list(range(len(names))):
        raise InputError(
            f"the config.json of {model.name} numbers its classes {sorted(names)}; expected 0 to "
            f"{len(names) - 1}: correct id2label and label2id"
        )
    if (by_id and by_name and by_id != by_name) or (names and number not in (None, len(names))):
        raise InputError(
            f"the config.json of {model.name} contradicts itself: id2label {by_id}, label2id "
            f"{by_name}, num_labels {number}; correct what says which output is which"
        )
    if by_name and not by_id:
        config.id2label = by_name
        config.label2id = {name: i for i, name in by_name.items()}


def _check_num_labels(model: ResolvedModel) -> None:
    """Refuse a config.json whose classes transformers would name one by one for ever."""
    try:
        given = json.loads((Path(model.location) / "config.json").read_text("utf-8"))["num_labels"]
    except (OSError, ValueError, LookupError, TypeError):
        return  # of the hub, without such an entry, or refused where it is read
    if isinstance(given, int | float) and given > MOST_CLASSES:
        raise InputError(
            f"the config.json of {model.name} has num_labels {given}; expected at most "
            f"{MOST_CLASSES}: correct that entry, or take it out"
        )


def _set_task(config: PretrainedConfig, kind: str, num_labels: int | None, name: str) -> None:
    if kind == "classification":
        if num_labels is None or num_labels < 2:
            raise InputError(f"a classification needs num_labels of 2 or more, got {num_labels}.")
        if num_labels > MOST_CLASSES:
            raise InputError(
                f"num_labels is {num_labels}; expected at most {MOST_CLASSES} classes, for a head "
                "of more fills the memory: give the number of classes of your task"
            )
        # Names of classes in the checkpoint stay when their number is the same.
        if config.num_labels != num_labels:
            config.num_labels = num_labels
        config.problem_type = "single_label_classification"
    elif kind == "regression":
        if num_labels not in (None, 1):
            raise InputError(f"a regression has one output, got num_labels={num_labels}.")
        config.num_labels = 1
        config.problem_type = "regression"
    elif kind == "causal-lm":
        if getattr(config, "is_encoder_decoder", False):
            raise InputError(f"{name} is an encoder-decoder, not a causal language model.")
        config.use_cache = False
        # Encoders such as BERT see only the past when told so.
        if getattr(config, "is_decoder", None) is False:
            config.is_decoder = True


def _set_padding(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Let the model and its tokenizer pad with one token.

    Of decoders it is the tokenizer's: they need it to find the last token of a text, and it can be
    its end token. Encoders keep their own, for some count positions from it (RoBERTa).
    """
    from transformers import AutoModelForMaskedLM

    own = getattr(config, "pad_token_id", None)
    words = tokenizer.get_vocab().values()
    if isinstance(own, int) and type(config) in AutoModelForMaskedLM._model_mapping:
        if tokenizer.pad_token_id != own and own in words:
            tokenizer.pad_token = str(tokenizer.convert_ids_to_tokens(own))
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise InputError(f"the tokenizer of {name} has neither a padding nor an end token.")
        tokenizer.pad_token = tokenizer.eos_token
    rows, token = getattr(config.get_text_config(), "vocab_size", None), tokenizer.pad_token_id
    if isinstance(rows, int) and isinstance(token, int) and token >= rows:
        raise fit.beyond_embedding(name, token, rows)
    config.pad_token_id = tokenizer.pad_token_id


def _architecture(
    auto: Any, config: PretrainedConfig, kind: str, name: str
) -> type[PreTrainedModel]:
    try:
        found = auto._model_mapping[type(config)]
    except KeyError:
        raise InputError(
            f"{name} is of type '{config.model_type}', for which transformers has no {kind} model."
        ) from None
    return found[0] if isinstance(found, tuple) else found


def _from_checkpoint(
    auto: Any, model: ResolvedModel, kind: str, goal: str | None, options: dict[str, Any]
) -> PreTrainedModel:
    """The model with its weights; ``goal`` is what its head was trained for, if it is known."""
    with _reading(model, "its weights"):
        built, report = auto.from_pretrained(
            model.location,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            trust_remote_code=False,
            **options,
        )
    prefix = f"{built.base_model_prefix}."

    def may_be_new(weight: str) -> bool:
        if kind in ("causal-lm", "masked-lm"):
            return False
        # Pooling layers belong to heads; many checkpoints are saved without.
        return "pooler." in weight or (kind != "backbone" and not weight.startswith(prefix))

    reshaped = {name: shapes for name, *shapes in report["mismatched_keys"]}
    lacking = sorted(key for key in {*report["missing_keys"], *reshaped} if not may_be_new(key))
    if lacking:
        if kind in ("causal-lm", "masked-lm") and not any(k.startswith(prefix) for k in lacking):
            raise fit.without_head(model.name, kind, lacking)
        shown = ", ".join(
            f"{key} (shape {tuple(reshaped[key][0])} there, {tuple(reshaped[key][1])} needed)"
            if key in reshaped
            else key
            for key in lacking[:5]
        )
        more = f" and {len(lacking) - 5} more" if len(lacking) > 5 else ""
        raise InputError(
            f"the weights of {model.name} do not fit its {type(built).__name__}: missing or of "
            f"another shape are {shown}{more}. Is config.json of another model, or the checkpoint "
            f"not meant for {kind}?"
        )
    fit.refuse_left_over(built, report["unexpected_keys"], model.name)
    drawn = sorted({*report["missing_keys"], *reshaped} - set(lacking))
    heads = [key for key in drawn if not key.startswith(prefix)]
    built.head_is_drawn = bool(heads)  # type: ignore[assignment] - a plain attribute
    if kind in ("classification", "regression"):
        fit.say_other_head(
            built, model.name, {k: reshaped[k] for k in heads if k in reshaped}, goal
        )
    return built


@contextmanager
def _reading(model: ResolvedModel, part: str) -> Iterator[None]:
    """Say which part of a model cannot be read; libraries raise errors of every kind of it.

    Raises:
        InputError: with the first line of the library's error.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        reason = first_lines(error, 2)
        if model.digest is None:
            raise InputError(
                f"{model.name} could not be loaded from the hub: {reason}. Check the id and the "
                "connection, or give a local folder or a packaged model (`deltacontrol models`)."
            ) from error
        raise InputError(
            f"{model.name} could not be loaded from {model.location}: {part} cannot be read "
            f"({reason}). Is a file damaged or of another model? Save the model and its tokenizer "
            "there again (save_pretrained)."
        ) from error


@contextmanager
def _drawn_from(seed: int) -> Iterator[None]:
    """Draw from `seed` inside, and leave the global generator as it was."""
    import torch

    before = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(before)


@contextmanager
def _without_load_report() -> Iterator[None]:
    """Keep transformers from reporting the new head and the unused weights as a problem.

    That report, and what is said of tied weights that are missing, is dropped: `_from_checkpoint`
    reads the same findings and raises where they matter. Other warnings pass.
    """
    from transformers.utils import logging as transformers_logging

    def passes(record: logging.LogRecord) -> bool:
        return not any(told in record.getMessage() for told in ("LOAD REPORT", "seem corrupted"))

    logger = logging.getLogger("transformers.modeling_utils")
    bars = transformers_logging.is_progress_bar_enabled()
    logger.addFilter(passes)
    transformers_logging._tqdm_active = False
    try:
        yield
    finally:
        transformers_logging._tqdm_active = bars
        logger.removeFilter(passes)
