# SPDX-License-Identifier: Apache-2.0
"""Questions from files in the tokens of a model, their answers checked by math-verify."""

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from moe_upgrpo.errors import UserError
from moe_upgrpo.hugging_face.config import eos_ids, read_config
from moe_upgrpo.hugging_face.tokenizer import note_on_turns, read_tokenizer
from moe_upgrpo.tasks.base import Problem, Tokens, refill_indices
from moe_upgrpo.tasks.files import Row, read_problems
from moe_upgrpo.tasks.math_verifier import MathVerifier


class MathTask:
    """Problems of local files (`read_problems`) as prompts for the model in `model_dir`.

    Args:
        data: files of training problems.
        eval_data: files of held-out problems; may be none.
        model_dir: Hugging Face checkpoint folder; its tokenizer writes the prompts.
        prompt_field, answer_field: names of the fields. None: those that are known.
        chat_template: `auto`, the tokenizer's own where it has one; `none`, no template; or a file
            with a Jinja template.
        chat_template_kwargs: JSON of what the template takes, `{"enable_thinking": false}`.
        instruction: text after each question.
        max_prompt_tokens: longer training problems are left out and counted, a longer held-out
            problem is an error: figures of different runs would be over different problems. None:
            no limit.
        trust_remote_code: run code of `model_dir` that its tokenizer needs.
        whole_rows: keep with each problem all that its row says, for rewards of your own.
        verifier: False where others judge, and math-verify is not needed.

    `notes` are lines for the screen: what was read, what was left out, and where the chat template
    ends answers with no end token.

    Raises:
        UserError: see `read_problems`; no tokenizer, or one that does not fit the model or the
            text; a template that is not there or fails; no problem short enough.
    """

    max_response_tokens = None

    def __init__(
        self,
        data: Sequence[Path],
        eval_data: Sequence[Path] = (),
        *,
        model_dir: Path,
        prompt_field: str | None = None,
        answer_field: str | None = None,
        chat_template: str = "auto",
        chat_template_kwargs: str = "{}",
        instruction: str = "",
        max_prompt_tokens: int | None = None,
        trust_remote_code: bool = False,
        whole_rows: bool = False,
        verifier: bool = True,
    ):
        self._verifier = MathVerifier() if verifier else None
        self._write = PromptWriter(
            model_dir, chat_template, chat_template_kwargs, instruction, trust_remote_code
        )
        self.notes = list(self._write.notes)
        fields = {
            "prompt_field": prompt_field,
            "answer_field": answer_field,
            "whole_rows": whole_rows,
        }
        self._training = self._problems("--data", data, fields)
        self._heldout = self._problems("--eval-data", eval_data, fields)
        if max_prompt_tokens is not None:
            self._limit(max_prompt_tokens)
        seen = {problem.prompt for problem in self._training}
        shared = sum(problem.prompt in seen for problem in self._heldout)
        if shared:
            self.notes.append(f"{shared} held-out problems are training problems as well")

    def _problems(self, option: str, files: Sequence[Path], fields: dict) -> list[Problem]:
        rows: dict[str | tuple, Row] = {}
        for file in files:
            read = read_problems(Path(file), **fields)
            self.notes.append(f"{option} {file}: {read.describe()}")
            for row in read.rows:
                first = rows.setdefault(row.prompt, row)
                if first.answer != row.answer:
                    raise UserError(
                        f"{row.where}: the answer is {row.answer!r}; the same question's is "
                        f"{first.answer!r} in {first.where}. Take one out."
                    )
        return self._write(list(rows.values()))

    def _limit(self, most: int) -> None:
        fitting = [p for p in self._training if len(p.prompt_ids) <= most]
        longer = len(self._training) - len(fitting)
        if not fitting:
            shortest = min(len(p.prompt_ids) for p in self._training)
            raise UserError(
                f"max_prompt_tokens={most}: no training problem is that short; the shortest has "
                f"{shortest} tokens."
            )
        if longer:
            self.notes.append(f"{longer} training problems of more than {most} tokens left out")
        self._training = fitting
        longest = max((len(p.prompt_ids) for p in self._heldout), default=0)
        if longest > most:
            raise UserError(
                f"max_prompt_tokens={most}: a held-out problem has {longest} tokens. Held-out "
                "problems are not left out: allow more, or take it out of the file."
            )

    @cached_property
    def max_prompt_tokens(self) -> int:
        return max(len(problem.prompt_ids) for problem in self._training + self._heldout)

    def training_problems(
        self, count: int, *, seed: int, step: int, refill: int = 0
    ) -> list[Problem]:
        """The step's `count` problems; see `Task`.

        Each epoch is a shuffle of all problems by (seed, epoch), cut into batches of `count`; the
        rest that fills no batch waits for another epoch.

        Raises UserError if there are not that many.
        """
        total = len(self._training)
        if not 1 <= count <= total:
            raise UserError(
                f"{count} training problems a step asked for; the files have {total}, and at "
                "least 1 is needed."
            )
        epoch, batch = divmod(max(step - 1, 0), total // count)
        order = np.random.default_rng((seed, epoch)).permutation(total)
        drawn = order[batch * count : (batch + 1) * count]
        if refill:
            drawn = refill_indices(drawn, total, count, seed=seed, step=step, refill=refill)
        return [self._training[i] for i in drawn]

    def heldout_problems(self) -> list[Problem]:
        return self._heldout

    @property
    def all_training_problems(self) -> list[Problem]:
        return self._training

    def reward(self, problem: Problem, response_ids: Tokens) -> float:
        """1.0 if the response's last answer equals the problem's under math-verify, else 0.0."""
        return float(self._verifier.right(problem.answer, self._write.text(response_ids)))

    def answer_classes(self, responses: Sequence[Tokens]) -> list[int | None]:
        """Equality is math-verify's; see `MathVerifier.classes`."""
        return self._verifier.classes([self._write.text(ids) for ids in responses])

    @property
    def killed(self) -> int:
        """Responses so far that took the verifier too long; they count as wrong."""
        return self._verifier.killed if self._verifier else 0

    def text(self, response_ids: Tokens) -> str:
        """A response as rewards read it, without special tokens."""
        return self._write.text(response_ids)

    def close(self) -> None:
        if self._verifier is not None:
            self._verifier.close()


class PromptWriter:
    """Rows to problems with prompt ids, by the tokenizer and the chat template of a model."""

    def __init__(
        self,
        model_dir: Path,
        chat_template: str,
        chat_template_kwargs: str,
        instruction: str,
        trust_remote_code: bool,
    ):
        self._model_dir, self._instruction = model_dir, instruction
        config = read_config(model_dir)
        self._tokenizer = read_tokenizer(model_dir, trust_remote_code=trust_remote_code)
        self._vocabulary = config.get_text_config().vocab_size
        ends = eos_ids(model_dir, config)
        self._check_end(ends)
        self._template = self._read_template(chat_template)
        self._kwargs = self._read_kwargs(chat_template_kwargs)
        turns = note_on_turns(self._tokenizer, self._template, self._kwargs, ends)
        self.notes = [turns] if turns else []

    def _check_end(self, ends: list[int]) -> None:
        if self._tokenizer.eos_token_id not in ends:
            raise UserError(
                f"{self._model_dir}: the tokenizer ends a text with token "
                f"{self._tokenizer.eos_token_id} ({self._tokenizer.eos_token}), the model's "
                f"generation stops at {ends}. Is it another model's tokenizer? If not, set "
                "eos_token_id in generation_config.json."
            )

    def _read_template(self, chat_template: str) -> str | None:
        if chat_template == "none":
            return None
        if chat_template == "auto":
            if not self._tokenizer.chat_template:
                return None
            try:
                return self._tokenizer.get_chat_template()
            except ValueError as error:  # several, and none of them the default
                raise UserError(
                    f"{self._model_dir}: {str(error).splitlines()[0]} Give --chat-template FILE."
                ) from None
        try:
            return Path(chat_template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"chat_template={chat_template!r} is neither auto nor none nor a file with a "
                f"template: {error}."
            ) from None

    def _read_kwargs(self, text: str) -> dict:
        try:
            kwargs = json.loads(text)
        except json.JSONDecodeError:
            kwargs = None
        if not isinstance(kwargs, dict):
            raise UserError(
                f"chat_template_kwargs={text!r}: a JSON object is needed, such as "
                '{"enable_thinking": false}.'
            )
        for name in kwargs:
            if name not in (self._template or ""):  # Jinja would say nothing
                why = "has no such name" if self._template else "is not there or not used"
                raise UserError(
                    f"chat_template_kwargs={text!r}: {name!r}: the chat template {why}."
                )
        return kwargs

    def __call__(self, rows: Sequence[Row]) -> list[Problem]:
        """The problems of `rows`, in their order."""
        texts = [self._text(row) for row in rows]
        # A template writes the special tokens itself.
        plain = self._template is None
        ids = self._tokenizer(texts, add_special_tokens=plain).input_ids if texts else []
        problems = []
        for row, text, prompt_ids in zip(rows, texts, ids, strict=True):
            self._check_ids(row, text, prompt_ids)
            problems.append(
                Problem(
                    prompt=text,
                    prompt_ids=np.array(prompt_ids, np.int64),
                    answer=row.answer,
                    row=row.data,
                )
            )
        return problems

    def _text(self, row: Row) -> str:
        messages = [("user", row.prompt)] if isinstance(row.prompt, str) else list(row.prompt)
        role, content = messages[-1]
        messages[-1] = (role, content + self._instruction)
        if self._template is None:
            messages = [(role, content) for role, content in messages if content]
            if len(messages) > 1:
                raise UserError(
                    f"{row.where}: a chat of {len(messages)} messages needs a chat template: "
                    f"{self._model_dir} has none, or chat_template=none was given."
                )
            return messages[0][1]
        from jinja2 import TemplateError

        try:
            return self._tokenizer.apply_chat_template(
                [{"role": role, "content": content} for role, content in messages],
                chat_template=self._template,
                add_generation_prompt=True,
                tokenize=False,
                **self._kwargs,
            )
        except (TemplateError, TypeError) as error:
            raise UserError(f"{row.where}: the chat template fails: {error}") from None

    def _check_ids(self, row: Row, text: str, prompt_ids: list[int]) -> None:
        unknown = self._tokenizer.unk_token
        if not prompt_ids or max(prompt_ids) >= self._vocabulary:
            raise UserError(
                f"{row.where}: the tokenizer writes the prompt with ids up to "
                f"{max(prompt_ids, default=None)}, the model in {self._model_dir} has "
                f"{self._vocabulary} tokens: it is another model's tokenizer."
            )
        if unknown and self._tokenizer.unk_token_id in prompt_ids and unknown not in text:
            raise UserError(
                f"{row.where}: the tokenizer of {self._model_dir} has no tokens for a part of "
                f"{text!r:.80}: it writes {unknown}. It is not made for this data."
            )

    def text(self, ids: Tokens) -> str:
        """A response as the verifier reads it, without special tokens."""
        return self._tokenizer.decode(ids, skip_special_tokens=True)
