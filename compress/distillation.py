"""What a student is trained on and by: the objective of `distill`, and the windows with what the teacher said of them.

The teacher's part comes with the batch, from a cache, or is asked of a teacher that runs beside. Logits exist a slice
at a time only, where the model's head is a layer on its last hidden state, which is tried (`head_of`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from compress.examples import IGNORED
from compress.losses import KL, Attention, Hidden, Labels, Loss
from compress.maths.divergence import TopK, divergence, sliced, top_k
from compress.teacher_cache import Kept, Said, TeacherCache, restored
from compress.training_windows import WindowsDataset

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from compress.data import Windows


#: Tasks of a row of text: to answer, or to give reasons.
ANSWER, RATIONALE = 0, 1


class Taught(WindowsDataset):
    """Windows as the trainer takes them, with their task, and with what the teacher said, where it is cached."""

    def __init__(self, windows: Windows, cache: TeacherCache | None = None, tasks: Tensor | None = None):
        super().__init__(windows)
        self.cache, self.tasks = cache, tasks

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        item = super().__getitem__(index)
        if self.tasks is not None:
            item["task"] = self.tasks[index]
        if self.cache is not None:
            item |= {f"taught.{name}": tensor for name, tensor in self.cache[index].items()}
        return item


@dataclass(frozen=True)
class Outputs:
    """What a model gave: `states` [batch, length, hidden] that `head` turns to logits (None: `states` are the logits
    themselves, or a model's that has none), blocks' outputs and attention maps as they were asked for."""

    states: Tensor
    head: nn.Module | None
    hidden: Sequence[Tensor] = ()
    attentions: Sequence[Tensor] = ()


@torch.no_grad()
def head_of(model: PreTrainedModel) -> nn.Module | None:
    """The layer that gives the logits from the last hidden state, if that is all there is to them: some families scale
    or bound them afterwards, or have more layers there. Tried on four tokens."""
    head = model.get_output_embeddings()
    if head is None or model.base_model is model:
        return None
    text = {"input_ids": torch.arange(4, device=model.device).unsqueeze(0) + 3}
    logits = model(**text).logits
    states = getattr(model.base_model(**text), "last_hidden_state", None)
    if states is None:
        return None
    found = head(states)
    same = found.shape == logits.shape and torch.allclose(found, logits, rtol=1e-4, atol=1e-5)
    return head if same else None


class Distillation(nn.Module):  # type: ignore[misc]
    """Its forward gives the weighted sum of the losses of a batch.

    `pairs`: for each hidden and attention loss, (student block, teacher block) pairs; `projections` are those of hidden
    losses whose widths differ. `teacher` is asked where a batch does not bring what it said. `on_policy`: the share of
    batches that the student writes itself.
    """

    def __init__(
        self, student: PreTrainedModel, losses: Sequence[Loss], kept: Kept, teacher: Teacher | None,
        pairs: Sequence[Sequence[tuple[int, int]]], projections: nn.ModuleDict, on_policy: float = 0.0,
        padding: int = 0,
    ):  # fmt: skip
        super().__init__()
        self.student, self.projections = student, projections
        self.losses, self.kept, self.pairs = list(losses), kept, list(pairs)
        self.on_policy, self.padding = on_policy, padding
        self.__dict__["teacher"] = teacher  # not registered: it is neither trained nor stored
        self.__dict__["head"] = head_of(student)
        #: Where no loss looks at logits, the head has no part in it.
        self.may_leave_unused = bool(on_policy) or not {"kl", "labels", "rationale"} & {loss.kind for loss in losses}

    def train(self, mode: bool = True) -> Distillation:
        """Stays as it is: dropout would be noise in what is to be imitated."""
        return self

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None,
        task: Tensor | None = None, **taught: Tensor,
    ) -> Tensor:  # fmt: skip
        written = None
        if self.on_policy and float(torch.rand(())) < self.on_policy:
            from compress.self_text import continued

            input_ids, attention_mask, written = continued(self.student, input_ids, labels, self.padding)
            taught, task, labels = {}, None, None
        text = {"input_ids": input_ids} | ({} if attention_mask is None else {"attention_mask": attention_mask})
        said = {name.removeprefix("taught."): tensor for name, tensor in taught.items()}
        live = None
        if not said and self.__dict__["teacher"] is not None:
            live = self.__dict__["teacher"](text)
            said = {f"hidden.{layer}": state for layer, state in live.hidden.items()}
        given = self._run(text)
        rows = _Rows.of(input_ids, attention_mask, labels, written, task, given.states)
        parts: list[Tensor] = []
        logit_terms = [loss.term for loss in self.losses if loss.kind in ("kl", "labels", "rationale")]
        if logit_terms and rows.index.numel():
            parts.append(self._logit_losses(logit_terms, given, rows, said, live, written is not None))
        for loss, pairs in zip(self.losses, self.pairs, strict=True):
            if isinstance(loss.term, Hidden):
                parts.append(loss.term.weight * self._hidden_loss(loss.term, pairs, given, said, attention_mask))
            elif isinstance(loss.term, Attention) and live is not None:
                parts.append(loss.term.weight * _attention_loss(pairs, given, live.attentions, attention_mask))
        return torch.stack(parts).sum() if parts else given.states.sum() * 0.0

    def _run(self, text: dict[str, Tensor]) -> Outputs:
        kinds = {loss.kind for loss in self.losses}
        more = {"output_hidden_states": True} if "hidden" in kinds else {}
        more |= {"output_attentions": True} if "attention" in kinds else {}
        return run_model(self.student, self.__dict__["head"], text, more)

    def _logit_losses(
        self, terms: Sequence[Any], given: Outputs, rows: _Rows, said: dict[str, Tensor], live: Live | None,
        written: bool,
    ) -> Tensor:  # fmt: skip
        """All losses on logits in one go over the slices; each is the mean over the rows that it counts."""
        states = given.states.flatten(0, -2)[rows.index]
        aims = {t.temperature: self._aim(t.temperature, rows, said, live) for t in terms if isinstance(t, KL)}
        shared = self.kept.vocabulary
        answered = rows.weights(ANSWER)
        reasoned = rows.weights(RATIONALE)

        def lost(logits: Tensor, part: slice) -> Tensor:
            total = logits.new_zeros((), dtype=torch.float32)
            for term in terms:
                if isinstance(term, KL):
                    aim = aims[term.temperature][part]
                    each = divergence(logits[:, :shared], aim, term.direction, term.beta, term.temperature)
                    total = total + term.weight * each.sum() / rows.index.numel()
                elif not written:
                    share = answered if isinstance(term, Labels) else reasoned
                    each = functional.cross_entropy(
                        logits.float(), rows.targets[part], ignore_index=IGNORED, reduction="none"
                    )
                    total = total + term.weight * (each * share[part]).sum()
            return total

        return sliced(states, lost, given.head, None if given.head is None else given.head.weight.shape[0])

    def _aim(self, temperature: float, rows: _Rows, said: dict[str, Tensor], live: Live | None) -> Tensor | TopK:
        """The teacher's distribution of those rows."""
        if live is None:
            return restored(said, self.kept, temperature)[rows.index]
        assert live.logits is not None
        logits = live.logits[..., : self.kept.vocabulary].flatten(0, -2)[rows.index]
        return top_k(logits, self.kept.k, temperature) if self.kept.k else logits

    def _hidden_loss(
        self, term: Hidden, pairs: Sequence[tuple[int, int]], given: Outputs, said: Mapping[str, Tensor],
        mask: Tensor | None,
    ) -> Tensor:  # fmt: skip
        losses = []
        for mine, other in pairs:
            state, aim = given.hidden[mine], said[f"hidden.{other}"].to(given.states.device)
            name = f"{mine}-{other}"
            if name in self.projections:
                state = self.projections[name](state)
            if mask is not None:
                state, aim = state[mask.bool()], aim[mask.bool()]
            losses.append(hidden_loss(state, aim, term.metric))
        return torch.stack(losses).mean()


def hidden_loss(state: Tensor, aim: Tensor, metric: str) -> Tensor:
    """`mse`: |state - aim|**2 / |aim|**2; `cosine`: the mean of 1 - cosine. [..., hidden], float32."""
    state, aim = state.float(), aim.float()
    if metric == "cosine":
        return (1 - functional.cosine_similarity(state, aim, dim=-1)).mean()
    return (state - aim).square().sum() / aim.square().sum()


def _attention_loss(
    pairs: Sequence[tuple[int, int]], given: Outputs, aims: Sequence[Tensor], mask: Tensor | None
) -> Tensor:
    """KL(teacher || student) of the attention of each query, mean over queries and heads; [batch, heads, length,
    length]."""
    losses = []
    for mine, other in pairs:
        q, p = given.attentions[mine].float(), aims[other].float()
        if q.shape[1] != p.shape[1]:
            q, p = q.mean(1, keepdim=True), p.mean(1, keepdim=True)
        floor = torch.finfo(torch.float32).tiny
        each = (p * (p.clamp_min(floor).log() - q.clamp_min(floor).log())).sum(-1).mean(1)
        losses.append(each.mean() if mask is None else each[mask.bool()].mean())
    return torch.stack(losses).mean()


@dataclass(frozen=True)
class _Rows:
    """The rows (tokens) of a batch that some loss on logits counts: `index` into all of them, `targets` the token that
    comes next (or the class), IGNORED where there is none, `task` of each."""

    index: Tensor
    targets: Tensor
    task: Tensor

    @classmethod
    def of(
        cls, ids: Tensor, mask: Tensor | None, labels: Tensor | None, written: Tensor | None, task: Tensor | None,
        states: Tensor,
    ) -> _Rows:  # fmt: skip
        """`labels` [batch, length] (IGNORED: not learnt) or, of a model that classifies, [batch]; `written` as `labels`
        for text that the student wrote."""
        if states.dim() == 2:  # one row a text
            targets = ids.new_full((len(states),), IGNORED) if labels is None else labels
            return cls(torch.arange(len(states), device=ids.device), targets, torch.zeros_like(targets))
        told = labels if labels is not None else written
        if told is None:
            text = ids if mask is None else ids.masked_fill(~mask.bool(), IGNORED)
            targets = _next(text)
            counted = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        else:
            targets = _next(told)
            counted = targets != IGNORED
        index = counted.flatten().nonzero().squeeze(1)
        tasks = torch.zeros_like(ids) if task is None else task.unsqueeze(1).expand_as(ids)
        return cls(index, targets.flatten()[index], tasks.flatten()[index])

    def weights(self, task: int) -> Tensor:
        """1 / number of the tokens to be learnt in this task, on these; 0 elsewhere."""
        chosen = (self.targets != IGNORED) & (self.task == task)
        return chosen.float() / chosen.sum().clamp_min(1)


def _next(tokens: Tensor) -> Tensor:
    """What comes after each token [batch, length]; IGNORED after the last."""
    return functional.pad(tokens[:, 1:], (0, 1), value=IGNORED)


@dataclass(frozen=True)
class Live:
    """What a teacher that runs beside said: logits [batch, length, vocabulary] or None, blocks' outputs, attention."""

    logits: Tensor | None
    hidden: dict[int, Tensor]
    attentions: Sequence[Tensor] = ()


class Teacher:
    """A model that is asked and never trained. `layers`: the blocks whose outputs are wanted."""

    def __init__(self, model: PreTrainedModel, layers: Sequence[int] = (), attention: bool = False):
        self.model, self.layers, self.attention = model, tuple(layers), attention

    @torch.no_grad()
    def __call__(self, text: dict[str, Tensor]) -> Live:
        more = {"output_hidden_states": True} if self.layers else {}
        more |= {"output_attentions": True} if self.attention else {}
        device = self.model.device
        out = self.model(**{name: tensor.to(device) for name, tensor in text.items()}, **more, **_uncached(self.model))
        hidden = {layer: out.hidden_states[layer + 1] for layer in self.layers}
        return Live(getattr(out, "logits", None), hidden, out.attentions if self.attention else ())

    def said(self, text: dict[str, Tensor]) -> Said:
        """Logits and blocks' outputs, as a cache keeps them."""
        live = self(text)
        return live.logits, live.hidden


def run_model(
    model: PreTrainedModel, head: nn.Module | None, text: dict[str, Tensor], more: dict[str, bool]
) -> Outputs:
    """Runs a student: up to the last hidden state where there is a head for it, else to the end."""
    runner = model if head is None else model.base_model
    out = runner(**text, **more, **_uncached(model))
    hidden = out.hidden_states[1:] if "output_hidden_states" in more else ()
    attentions = out.attentions if "output_attentions" in more else ()
    logits = getattr(out, "logits", None) if head is None else None
    return Outputs(out.last_hidden_state if logits is None else logits, head, hidden, attentions)


def _uncached(model: PreTrainedModel) -> dict[str, bool]:
    return {"use_cache": False} if model.can_generate() else {}


def even_pairs(mine: int, other: int) -> list[tuple[int, int]]:
    """Every block of a student of `mine` blocks with the teacher's, of `other`, that ends as far through the model.

    >>> even_pairs(3, 6)
    [(0, 1), (1, 3), (2, 5)]
    """
    return [(block, max(0, (block + 1) * other // mine - 1)) for block in range(mine)]
