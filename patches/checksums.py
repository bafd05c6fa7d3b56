"""Fill in the checksums of a series from a clean copy of the stack.

    python patches/checksums.py patches/megatron-core/0.16.1 DIR

DIR holds the top-level package as upstream released it. Everything else in series.yaml is written
by hand; this rewrites it with its `sha256` entries, in the order of its patches.
"""

import argparse
from pathlib import Path

import yaml

from moe_upgrpo.patching import diffs
from moe_upgrpo.patching.series import checksum, load


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("root", type=Path)
    arguments = parser.parse_args()
    manifest = arguments.folder / "series.yaml"
    series = yaml.safe_load(manifest.read_text())
    contents: dict[str, bytes | None] = {}
    for patch in series["patches"]:
        patch["sha256"] = {}
        hunks = diffs.parse((arguments.folder / patch["file"]).read_bytes(), patch["file"])
        for file, changes in hunks.items():
            source = arguments.root / file
            if file not in contents:
                contents[file] = source.read_bytes() if source.exists() else None
            before = contents[file]
            contents[file] = diffs.apply(before or b"", changes)
            patch["sha256"][file] = [checksum(before), checksum(contents[file])]
    manifest.write_text(yaml.safe_dump(series, sort_keys=False, width=98, allow_unicode=True))
    print(f"{len(contents)} files, {len(load(arguments.folder).patches)} patches")


if __name__ == "__main__":
    main()
