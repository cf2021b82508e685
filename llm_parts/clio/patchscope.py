"""A cluster named by its mean: the mean hidden state of its summaries, decoded by the causal model that made it.

The state of a summary is what one decoder layer makes of its last token, which has seen all others. The mean over the
members is put in the place of a placeholder token of a naming prompt, behind the same layer, and the model goes on from
there: it writes the name of what it was never shown as text. Source: Ghandeharioun et al., Patchscopes, ICML 2024.

    scope = load_patchscope("Qwen/Qwen3-0.6B", settings=settings.patchscope)
    scope.name(["The user asks for a refund.", "The user wants money back."])
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from common.config import UserError
from llm_parts.clio.vector_settings import PatchscopeSettings

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

MAX_NAME_WORDS = 10
_MARK = "\u2047placeholder\u2047"  # parts the prompt where the state goes; in no prompt by chance
_BATCH_TEXTS = 16
_MAX_TOKENS = 512


class Patchscope:
    """A causal model that states are read from and put into; make one with `load_patchscope`."""

    def __init__(self, model: Any, tokenizer: Any, *, settings: PatchscopeSettings) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.settings = settings
        layers = decoder_layers(model)
        self.layer = layers[min(len(layers) - 1, int(settings.layer * len(layers)))]

    def name(self, texts: Sequence[str]) -> str:
        """The name that the model gives the mean of `texts`, of ten words at most; empty where it writes none."""
        return self.decode(mean_state(self.states(texts), keep_length=self.settings.keep_length))

    def states(self, texts: Sequence[str]) -> np.ndarray:
        """What the layer makes of the last token of each text, [n, d] float32; empty texts are left out.

        Raises UserError where no text is left.
        """
        import torch

        tokens = [ids for text in texts if (ids := self._tokenize(text)[:_MAX_TOKENS])]
        if not tokens:
            raise UserError("patchscope: all texts are empty, so there is no mean to decode")
        states: list[np.ndarray] = []
        with torch.inference_mode():
            for start in range(0, len(tokens), _BATCH_TEXTS):
                states.append(self._last_states(tokens[start : start + _BATCH_TEXTS]))
        return np.concatenate(states)

    def decode(self, state: np.ndarray) -> str:
        """Generate from the naming prompt with `state` [d] in the place of its placeholder; greedy, so repeatable.

        Raises UserError where the state is not finite or of another length than the model's.
        """
        import torch

        n_dimensions = int(self.model.config.hidden_size)
        if state.shape != (n_dimensions,) or not np.isfinite(state).all():
            raise UserError(f"patchscope: a state of {n_dimensions} finite numbers is needed, not {state.shape}")
        ids, place = self._prompt()
        inputs = torch.tensor([ids], device=self.model.device)
        with torch.inference_mode(), self._hooked(_put(state, place=place)):
            output = self.model.generate(
                input_ids=inputs,
                attention_mask=torch.ones_like(inputs),
                max_new_tokens=self.settings.max_new_tokens,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                pad_token_id=self._padding,
            )
        return clean_name(self.tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True))

    @property
    def _padding(self) -> int:
        for token_id in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id):
            if token_id is not None:
                return int(token_id)
        return 0

    def _tokenize(self, text: str, *, special: bool = True) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=special)["input_ids"]) if text.strip() else []

    def _last_states(self, tokens: list[list[int]]) -> np.ndarray:
        """States [b, d] behind the layer at the last token of each text; padding is at the right, where none looks."""
        import torch

        width = max(map(len, tokens))
        ids = torch.tensor([row + [self._padding] * (width - len(row)) for row in tokens], device=self.model.device)
        ends = torch.tensor([len(row) for row in tokens], device=self.model.device)
        mask = (torch.arange(width, device=ids.device)[None, :] < ends[:, None]).long()
        seen: list[torch.Tensor] = []
        with self._hooked(lambda hidden: seen.append(hidden)):
            self.model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
        return seen[0][range(len(tokens)), ends - 1].float().cpu().numpy()

    def _prompt(self) -> tuple[list[int], int]:
        """Token numbers of the naming prompt, and the place of the placeholder among them."""
        text = self.settings.prompt.replace("{placeholder}", _MARK)
        is_chat = self.tokenizer.chat_template is not None
        if is_chat:
            message = [{"role": "user", "content": text}]
            options = {"add_generation_prompt": True, "tokenize": False, "enable_thinking": False}
            text = str(self.tokenizer.apply_chat_template(message, **options))
        before, _, after = text.partition(_MARK)
        # The parts are tokenised apart, so that the placeholder is one token whatever stands beside it.
        head = self._tokenize(before, special=not is_chat)
        tail = self._tokenize(after, special=False)
        if head and head[-1] == self.tokenizer.eos_token_id:
            head = head[:-1]  # some tokenizers end every text
        neutral = self._tokenize("?", special=False)[-1:] or [self._padding]
        return [*head, *neutral, *tail], len(head)

    @contextmanager
    def _hooked(self, see: Callable[[torch.Tensor], torch.Tensor | None]) -> Iterator[None]:
        """Show each output of the layer [b, t, d] to `see`, and go on with what it returns, if anything."""

        def hook(module: Any, arguments: Any, output: Any) -> Any:
            hidden = output[0] if isinstance(output, tuple) else output
            changed = see(hidden)
            if changed is None:
                return output
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        handle = self.layer.register_forward_hook(hook)
        try:
            yield
        finally:
            handle.remove()


def load_patchscope(model_name_or_path: str, *, settings: PatchscopeSettings, load_in_4bit: bool = True) -> Patchscope:
    """Load a causal model to decode with, once a process, and shared with a provider that answers by it.

    Raises UserError where there is no such model, or none whose layers are known.
    """
    from llm_parts.wires.transformers_wire import load_causal_lm

    model, tokenizer = load_causal_lm(model_name_or_path, load_in_4bit=load_in_4bit)
    return Patchscope(model, tokenizer, settings=settings)


def decoder_layers(model: Any) -> Any:
    """The list of a causal model's decoder layers, as it is called in most of them; raises UserError for others."""
    for base in (model.base_model, getattr(model.base_model, "decoder", None)):
        for name in ("layers", "h", "blocks"):
            if hasattr(base, name):
                return getattr(base, name)
    raise UserError(f"patchscope: {type(model).__name__} has no list of layers that is known; name clusters otherwise")


def mean_state(states: np.ndarray, *, keep_length: bool = True) -> np.ndarray:
    """The mean [d] of states [n, d]; with `keep_length` as long as they are on the average.

    A mean of states that differ is shorter than any of them, and a model knows none so short.
    """
    mean = states.mean(axis=0, dtype=np.float64)
    length = float(np.linalg.norm(mean))
    if keep_length and length > 0:
        mean *= float(np.linalg.norm(states, axis=1).mean()) / length
    return mean.astype(np.float32)


def clean_name(text: str) -> str:
    """The first line of what was generated, without quotes and marks around it, cut to ten words."""
    line = next((line.strip() for line in text.splitlines() if line.strip()), "")
    return " ".join(line.strip("\"'`*#.:- ").split()[:MAX_NAME_WORDS])


def _put(state: np.ndarray, *, place: int) -> Callable[[torch.Tensor], torch.Tensor | None]:
    """Put `state` [d] at `place` of the prompt; later tokens meet it in the keys and values that are made of it."""
    is_done = False

    def put(hidden: torch.Tensor) -> torch.Tensor | None:
        import torch

        nonlocal is_done
        if is_done:  # the first call is the prompt, each later one a new token
            return None
        is_done = True
        changed = hidden.clone()
        changed[:, place] = torch.from_numpy(state).to(hidden)
        return changed

    return put
