"""A Hugging Face configuration -> its module on the meta device, adapted so that it traces whole.

No weights and no remote code: the class is the one that the configuration's `architectures` names
in the installed transformers, or its `model_type`'s language model.
"""

from __future__ import annotations

import contextlib
import difflib
import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import transformers
from torch import nn

from ir.capture import hf_patches, limits, meta
from ir.capture.load import Inputs, Source
from ir.errors import PlanError, UsageError

# What a configuration says about stored weights or other code, not about the model that trains.
_DROPPED = ("quantization_config", "auto_map", "transformers_version", "_name_or_path")
_LENGTHS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "context_length")
_Tracing = Callable[[], contextlib.AbstractContextManager[None]]


def source(
    config: Mapping[str, Any], *, name: str, args: Mapping[str, str], key: str, where: str
) -> Source:
    """Build the module that a `config.json` describes.

    args: keys of the configuration to change, such as num_hidden_layers. where: for messages.
    """
    raw = _changed(config, args, where)
    with _quiet():
        cls = _model_class(raw, where)
        built = _configuration(cls, raw, where)
        with _explained(f"transformers cannot build {cls.__name__} from it", where):
            model = build(cls, built)
        limits.require_parameters(model, where)
        tracing, notes = adapt(model)
    text = built.get_text_config()
    return Source(
        model=model,
        name=name,
        key=key,
        kind="hf",
        task="causal-lm" if cls.__name__.endswith(("CausalLM", "LMHeadModel")) else _task(model),
        inputs=_inputs(model),
        targets=None,
        loss=None,
        max_seq_len=next((n for n in (getattr(text, k, None) for k in _LENGTHS) if n), None),
        seq_in_input=model.main_input_name == "input_ids",
        notes=notes + _left_out(raw, built),
        tracing=tracing,
    )


def build(cls: type[Any], config: Any) -> Any:
    """Construct a model on meta, in the configuration's dtype, bf16 where it says none."""
    _without_cache(config)
    dtype = getattr(config, "dtype", None) or config.get_text_config().dtype or torch.bfloat16
    hf_patches.register()
    with torch.device("meta"), _without_init():
        model = cls._from_config(config, dtype=dtype)
    model.tie_weights()  # what is not initialised is not tied either
    meta.move_to_meta(model)
    model.train()
    return model


def adapt(model: nn.Module) -> tuple[_Tracing, tuple[str, ...]]:
    """Choose our attention and experts where a model takes them. -> what to trace under, notes."""
    hf_patches.register()
    notes: list[str] = []
    for module in model.modules():
        if not isinstance(module, transformers.PreTrainedModel):
            continue
        _without_cache(module.config)
        kind = _attention_kind(module)
        module.config._attn_implementation = kind
        own = not kind.startswith(hf_patches.NAME)
        if own and any("Attention" in name for name in _classes(module)):
            notes.append(f"attention as {module.config.model_type} spells it: {kind}")
        module.config._experts_implementation = hf_patches.NAME

    @contextlib.contextmanager
    def tracing() -> Iterator[None]:
        with meta.tracing(), hf_patches.scans_as_operators(model):
            yield

    return tracing, tuple(dict.fromkeys(notes))


def _attention_kind(model: transformers.PreTrainedModel) -> str:
    """Ours where the model's file looks its attention up, else its own."""
    if "ALL_ATTENTION_FUNCTIONS" in vars(sys.modules[type(model).__module__]):
        indexed = any("Indexer" in name for name in _classes(model))
        return hf_patches.MASKED if indexed else hf_patches.NAME
    return "sdpa" if model._supports_sdpa else "eager"


def _classes(model: nn.Module) -> set[str]:
    return {type(module).__name__ for module in model.modules()}


def _without_cache(config: Any) -> None:
    """Training keeps no key-value cache."""
    for part in (config, *(getattr(config, key, None) for key in config.sub_configs)):
        if part is not None:
            part.use_cache = False


@contextlib.contextmanager
def _without_init() -> Iterator[None]:
    """Skip filling parameters that have no memory."""
    from transformers import initialization

    with initialization.no_init_weights():
        yield


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No advice about kernels that are not installed: nothing runs here."""
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)


def _changed(config: Mapping[str, Any], args: Mapping[str, str], where: str) -> dict[str, Any]:
    """The configuration without what concerns storage, with `--arg` keys changed."""
    raw = {key: value for key, value in config.items() if key not in _DROPPED}
    for name, text in args.items():
        owner = raw if name in raw else raw.get("text_config", {})
        if name not in owner:
            raise UsageError(
                f"--arg {name}: the configuration has no such key",
                where=where,
                why=f"it has {', '.join(sorted(raw))}",
            )
        owner = owner if owner is raw else raw.setdefault("text_config", dict(owner))
        kind = type(owner[name])
        if kind not in (int, float, str, bool):
            raise UsageError(f"--arg {name}: only a number or a text can be changed", where=where)
        try:
            owner[name] = text.lower() == "true" if kind is bool else kind(text)
        except ValueError:
            raise UsageError(f"--arg {name}={text}: expected {kind.__name__}") from None
        if name == "num_hidden_layers" and isinstance(owner.get("layer_types"), list):
            owner["layer_types"] = owner["layer_types"][: owner[name]]
    limits.require_sane(raw, where)
    return raw


def _model_class(raw: Mapping[str, Any], where: str) -> type[Any]:
    """The class in `architectures`, else the language model of `model_type`."""
    names = [name for name in raw.get("architectures") or () if isinstance(name, str)]
    for name in names:
        found = getattr(transformers, name, None)
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            return found
    from transformers.models.auto import modeling_auto as auto

    kind = str(raw.get("model_type", ""))
    text, images = (
        auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )  # fmt: skip
    named = (found for found in (text.get(kind), images.get(kind)) if found)
    classes = [getattr(transformers, x if isinstance(x, str) else x[0]) for x in named]
    if not classes:
        near = difflib.get_close_matches(kind, {**text, **images}, n=3)
        raise PlanError(
            f"transformers {transformers.__version__} knows neither model_type '{kind}' "
            f"nor {' or '.join(names) or 'an architecture'}",
            where=where,
            why=f"nearest model types: {', '.join(near)}" if near else "",
            hints=("a model.py whose build() returns the module works for any architecture",),
        )
    # A text class may go by a model_type whose configuration has towers beside the text.
    whole = [cls for cls in classes if cls.config_class.model_type == kind]
    return (whole or classes)[0]


def _configuration(cls: type[Any], raw: Mapping[str, Any], where: str) -> Any:
    """The class's configuration object, whatever `model_type` the file claims."""
    own = cls.config_class
    keys = {key: value for key, value in raw.items() if key != "model_type"}
    with _explained(f"transformers refuses this {own.__name__}", where):
        return own.from_dict(keys)


@contextlib.contextmanager
def _explained(what: str, where: str) -> Iterator[None]:
    """Turn transformers' exception into a message about the configuration."""
    try:
        yield
    except PlanError:
        raise
    except Exception as error:
        why = f"{type(error).__name__}: {error} (transformers {transformers.__version__})"
        raise PlanError(what, where=where, why=why) from error


def _task(model: Any) -> str:
    if model.main_input_name == "pixel_values":
        return "vision"
    return "causal-lm" if model.main_input_name == "input_ids" and model.can_generate() else "other"


def _inputs(model: Any) -> Callable[[int, int], Inputs]:
    """Token ids; images of the configured size for a vision model."""
    config, name = model.config, model.main_input_name

    def token_ids(batch: int, seq_len: int) -> Inputs:
        ids = torch.zeros(batch, seq_len, dtype=torch.int64, device="meta")
        if getattr(config, "is_encoder_decoder", False):
            return {"input_ids": ids, "decoder_input_ids": torch.zeros_like(ids)}
        return {"input_ids": ids}

    def images(batch: int, seq_len: int) -> Inputs:
        size = config.image_size
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        shape = (batch, getattr(config, "num_channels", 3), height, width)
        return {"pixel_values": torch.zeros(shape, dtype=model.dtype, device="meta")}

    return images if name == "pixel_values" else token_ids


def _left_out(raw: Mapping[str, Any], config: Any) -> tuple[str, ...]:
    """What the configuration has and the traced module does not run, in words."""
    towers = [
        key
        for key in config.sub_configs
        if key.startswith(("vision", "audio", "image", "speech")) and getattr(config, key, None)
    ]
    notes = [f"inputs are text alone: {key}'s part is counted but not run" for key in towers]
    if raw.get("num_nextn_predict_layers"):
        notes.append("multi-token prediction layers are not part of the transformers module")
    return tuple(notes)
