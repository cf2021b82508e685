"""A causal language model in this process, by transformers; in 4 bits where a GPU and bitsandbytes are."""

from __future__ import annotations

import importlib.util
import logging
import threading
from functools import cached_property, lru_cache
from typing import Any, ClassVar

from common.config import UserError
from llm_parts.settings import LlmSettings
from llm_parts.wires.base import Capabilities, Reply, Wire, WireCall
from llm_parts.wires.triton_wire import render_prompt

log = logging.getLogger(__name__)


class TransformersWire(Wire):
    """Generates one answer at a time: the model fills the device, and calls side by side would only share it."""

    needs_preflight: ClassVar[bool] = False

    def __init__(self, settings: LlmSettings) -> None:
        super().__init__(settings)
        self._lock = threading.Lock()

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        return load_causal_lm(self.model, load_in_4bit=self.settings.load_in_4bit)

    def send(self, call: WireCall, capabilities: Capabilities) -> Reply:
        """Generate one answer; raises UserError where the model cannot be loaded or does not fit the device."""
        import torch

        with self._lock:
            model, tokenizer = self._loaded
            inputs = self._inputs(call, tokenizer).to(model.device)
            n_prompt = inputs["input_ids"].shape[1]
            if self.settings.seed is not None:
                torch.manual_seed(self.settings.seed)
            try:
                with torch.inference_mode():
                    output = model.generate(**inputs, **_sampling(call), pad_token_id=_padding(tokenizer))
            except torch.OutOfMemoryError:
                raise UserError(
                    f"model {self.model}: a prompt of {n_prompt} tokens does not fit into the memory of "
                    f"{model.device}; choose a smaller model, or lower llm_cluster.shortlist or llm.max_answer_tokens"
                ) from None
        answer = output[0, n_prompt:]
        return Reply(
            tokenizer.decode(answer, skip_special_tokens=True),
            finish="length" if len(answer) >= call.max_tokens else "stop",
            tokens_in=n_prompt,
            tokens_out=len(answer),
        )

    def _inputs(self, call: WireCall, tokenizer: Any) -> Any:
        if tokenizer.chat_template is None:
            text = render_prompt(call.messages, template=self.settings.chat_template)
            return tokenizer(text, return_tensors="pt", return_token_type_ids=False)
        return tokenizer.apply_chat_template(
            call.messages,
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
            enable_thinking=bool(self.settings.think),  # templates that know no such switch ignore it
        )


@lru_cache(maxsize=1)
def load_causal_lm(model_name_or_path: str, *, load_in_4bit: bool = True) -> tuple[Any, Any]:
    """A causal model, ready to generate, and its tokenizer; loaded once a process.

    Raises UserError where there is no such model.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from common.backend import choose_device, choose_dtype
    from common.model_files import resolve_model

    resolved = resolve_model(model_name_or_path)
    device = choose_device("auto")
    options: dict[str, Any] = {"dtype": getattr(torch, choose_dtype("auto", device=device))}
    if load_in_4bit and device.startswith("cuda"):
        options |= _four_bits(options["dtype"])
    try:
        tokenizer = AutoTokenizer.from_pretrained(resolved)
        model: Any = AutoModelForCausalLM.from_pretrained(resolved, **options)
    except (OSError, ValueError) as problem:
        reason = " ".join(str(problem).split())[:300]
        raise UserError(
            f"llm.model {model_name_or_path}: not a causal model that can be loaded ({reason}); give a Hugging Face id "
            "or a folder that save_pretrained wrote"
        ) from problem
    # Where the vocabulary is missing, transformers makes a tokenizer of special tokens alone, which knows no word.
    if tokenizer.vocab_size <= len(set(tokenizer.all_special_ids)):
        raise UserError(
            f"llm.model {model_name_or_path}: its tokenizer has no vocabulary; save the tokenizer beside the weights "
            "with save_pretrained"
        )
    if "quantization_config" not in options:
        model = model.to(device)
    return model.eval(), tokenizer


def _four_bits(dtype: Any) -> dict[str, Any]:
    if importlib.util.find_spec("bitsandbytes") is None:
        log.warning(
            "llm.load_in_4bit: bitsandbytes is not installed, so the weights are loaded whole; "
            "run: pip install bitsandbytes accelerate"
        )
        return {}
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    return {"quantization_config": config, "device_map": "auto"}


def _sampling(call: WireCall) -> dict[str, Any]:
    """Arguments of `generate`; temperature 0 and no temperature are greedy, whatever the model's own defaults say."""
    if not call.temperature:
        return {
            "max_new_tokens": call.max_tokens,
            "do_sample": False,
            "temperature": None,
            "top_p": None,
            "top_k": None,
        }
    return {
        "max_new_tokens": call.max_tokens,
        "do_sample": True,
        "temperature": call.temperature,
        "top_p": call.top_p or 1.0,
    }


def _padding(tokenizer: Any) -> int | None:
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
