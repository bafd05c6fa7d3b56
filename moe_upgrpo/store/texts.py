# SPDX-License-Identifier: Apache-2.0
"""Words of a run: its prompts by step, and the text of each token id.

A run keeps both, so that its responses can be read where its model is absent. A token's text is
bytes: byte-level tokenizers cut characters apart.
"""

import codecs
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from moe_upgrpo.errors import UserError
from moe_upgrpo.store.files import publish
from moe_upgrpo.store.parquet import read_checked, write_checked

_PROMPTS = re.compile(r"prompts-(\d{6}|[1-9]\d{6,})-rank-(\d{4}|[1-9]\d{4,})\.parquet")
_PART = "◌"  # for a token that ends within a character


def prompt_files(tokens: Path) -> list[tuple[Path, int]]:
    """The files of prompts in a ``tokens`` folder and their steps."""
    found = [(file, _PROMPTS.fullmatch(file.name)) for file in tokens.glob("prompts-*.parquet")]
    return sorted(((f, int(m[1])) for f, m in found if m), key=lambda item: (item[1], item[0].name))


def write_prompts(
    tokens: Path, step: int, rank: int, prompts: Mapping[int, Sequence[int] | np.ndarray]
) -> Path:
    """Write the token ids of a step's prompts, by their index within the step."""
    file = tokens / f"prompts-{step:06d}-rank-{rank:04d}.parquet"
    part = tokens / f".{file.name}.tmp"
    ids = [np.asarray(found, dtype=np.int32) for found in prompts.values()]
    table = pa.table(
        {
            "prompt": pa.array(list(prompts), pa.int32()),
            "length": pa.array([len(found) for found in ids], pa.int32()),
            # As bytes: checksums of nested columns work only for lists of one length.
            "token_ids": pa.array([found.astype("<i4").tobytes() for found in ids], pa.binary()),
        }
    )
    write_checked(table, part)
    publish(part, file)
    return file


def read_prompts(run: str | Path, step: int) -> dict[int, np.ndarray]:
    """The token ids of a step's prompts; none from files that cannot be read."""
    found: dict[int, np.ndarray] = {}
    for file, of_step in prompt_files(Path(run) / "tokens"):
        if of_step != step:
            continue
        try:
            table = read_checked(file)
            pairs = zip(table["prompt"].to_pylist(), table["token_ids"].to_pylist(), strict=True)
            found |= {prompt: np.frombuffer(ids, "<i4") for prompt, ids in pairs}
        except (pa.ArrowException, OSError, KeyError, ValueError, TypeError):
            continue
    return found


def write_vocabulary(run: str | Path, texts: Mapping[int, bytes]) -> Path:
    """Keep the bytes of each token id in the run folder. Raises UserError where there is none."""
    if not texts:
        raise UserError("a vocabulary without a token has nothing to write")
    file = Path(run) / "vocabulary.parquet"
    part = file.with_name(f".{file.name}.tmp")
    columns = {
        "token_id": pa.array(list(texts), pa.int32()),
        "text": pa.array(list(texts.values()), pa.binary()),
    }
    write_checked(pa.table(columns), part)
    publish(part, file)
    return file


def read_vocabulary(run: str | Path, ids: Collection[int]) -> dict[int, bytes] | None:
    """The bytes of some token ids; None where the run keeps no vocabulary that can be read."""
    file = Path(run) / "vocabulary.parquet"
    try:
        table = read_checked(file)
        table = table.filter(pc.is_in(table["token_id"], pa.array(sorted(ids), pa.int32())))
        pairs = zip(table["token_id"].to_pylist(), table["text"].to_pylist(), strict=True)
        return {token: text for token, text in pairs if isinstance(text, bytes)}
    except (pa.ArrowException, OSError, KeyError, ValueError, TypeError):
        return None


def as_texts(ids: Sequence[int], vocabulary: Mapping[int, bytes]) -> list[str]:
    """Each token's text in its place; a character made by several tokens is the last one's."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    texts = []
    for token in ids:
        if (found := vocabulary.get(int(token))) is None:
            texts.append(decoder.decode(b"", final=True) + f"[{token}]")
            decoder.reset()
            continue
        texts.append(decoder.decode(found) or (_PART if found else ""))
    if left := decoder.decode(b"", final=True):
        texts[-1] += left
    return texts
