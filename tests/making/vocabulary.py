"""Builds `common-nouns.txt`, some 4,000 common nouns for things that can be photographed.

The names come from the WordNet labels of ImageNet-21k inside timm; CLIP's token table inside open_clip_torch says
which words are common. Both packages are only read as files, never imported; only the names are kept.

    pip download --no-deps --dest wheels timm==1.0.31 open_clip_torch==3.3.0
    python tests/making/vocabulary.py wheels/timm-1.0.31-py3-none-any.whl \
        wheels/open_clip_torch-3.3.0-py3-none-any.whl

A name is kept if
1. its synset is one of ImageNet-1k, or of ImageNet-12k and of the cleaned ImageNet-21k-P (at least 500 good images);
2. the synset is an animal, artefact, food, natural object or plant. WordNet 3.0 numbers its synsets by their place in
   the data file, which is ordered by such categories (`lexnames(5WN)`), so five ranges of numbers tell; people, acts,
   body parts, groups, shapes and substances lie outside them. A definition that speaks of a person drops it as well;
3. the first lemma is lower-case (no proper or Latin name) and has one or two words, without hyphens;
4. every word of it is a single token for CLIP, so that it was common in the captions CLIP was trained on; names from
   ImageNet-1k are excused from this;
5. it is not among those excluded by hand below.
Of spellings that differ only in spaces one is kept. If more than `--size` names remain, names of ImageNet-1k go
first, then single words, then pairs of words by the CLIP rank of their rarer word.
"""

from __future__ import annotations

import argparse
import gzip
import os
import re
import sys
import zipfile
from pathlib import Path


SIZE = 4000
OUTPUT = Path(__file__).parents[2] / "hf_transmiter" / "assets" / "vocabulary" / "common-nouns.txt"
HEADER = """\
# {count} common visual nouns, one a line, in alphabetical order.
# Built by tests/making/vocabulary.py from the WordNet 3.0 labels of ImageNet-21k in timm; licences in NOTICE.
"""
# First and one-past-last synset number of WordNet's noun.animal, noun.artifact, noun.food, noun.object, noun.plant.
CATEGORIES = ((1310000, 2660000), (2660000, 4620000), (7550000, 7990000), (9180000, 9500000), (11540000, 13150000))
PERSON = re.compile(r"(an?|any|the)? ?\b(person|someone|one who|people|man|woman|boy|girl|worker|member)\b")
NAME = re.compile(r"[a-z]+('s|s')?( [a-z]+)?")
# CLIP's table lists 49,152 - 256 - 2 merges after one header line; its byte and special tokens are not in the file.
MERGES = 49152 - 256 - 2
# Single words whose everyday sense is not the one in the picture ("king" is the piece in draughts), or that are too
# general to be pictured.
UNCLEAR = """
abaya accelerator accommodation admiral adult agua alarm amazon annual apparel apse area argyle arm array arum
ascent ass assembly attire back background backseat balance bap bartlett base bearing ben berlin bill billy binder
binding bit bite black blind bling block blue bluff bock boom bottom boxer brace brae brake brant brew broadcaster
bronco buck buffer bug butte cache can case cast caster cell charger checker checkout chuck circle coating
cob cock cog coho col collection collins combine composite connection conserve contact control cords corner cos counter
course court cove craft creeper cross cue cur date delft den descent device diet dietary dip dirk disposal dita dobson
doe down downhill drake drive driver dun ear electric emperor enamel engineering ensemble equipment ern establishment
everlasting express facing fare felt fetus fieldwork file filly finder fizz fly fob foil fold formula fret gag gar gat
gearing gemma geneva gig gilt greens grey hack hackney hail hall halter hand hart highland hip hobby holder hole homo
hone housing imprint indicator institution instrument interface jig kea keep kelpie kid king kirk kiss kitty lame
launcher leg level lobe local lookout madras male manger manta marker masterpiece match maxi measure mechanism memorial
memory mew miller ministry miro mite module monarch moray mount movement mufti nan nanny negative net nib nude
objective ordinary organ orphan overall oxford pack papillon partition patas patch pave pea people peripheral permit
pest petal phoebe pick pickup pink pinto planner playback pod point pointer poke poll pooch portable porter portfolio
post predator press prey print projectile pull punch punt putter quill radial range ray recess recording redbone reel
refresher regulator rein relay rendering residence rhea ridley ringlet rocker roller romper roulette round royal
ruin rule safe scale scape scavenger secretary separate server setter settle shad sheath shire shiv shoulder
sights sire slope slot snag sorrel sour sow special spice spit spoiler spoke spur stacks stage stall stand starter step
stock stole strand stray structure stud study sty sunglass surgery suspension sweet swift switch system tack tam tangle
tap terry thong ticking titi toby token tom tongue tonic top tor track transporter trigger troll truss tun turner
turnover tusker uke uphill uplift upright vane vanilla veronica vintage wahoo walker ward waterproof web weekender
weight weir welt western wether white wick winder wiring woof world wrap yearling young
"""
# Names that hurt or picture cruelty, separated by commas.
HURTFUL = (
    "rape, nipple, electric chair, guillotine, car bomb, gypsy moth, oriental cherry, oriental poppy, "
    "oriental spruce, jew's harp, domestic ass, hydrogen bomb, atom bomb"
)


def read(package: Path, name: str) -> bytes:
    """A file out of a wheel or out of the site-packages folder that holds the installed package."""
    if package.is_dir():
        return (package / name).read_bytes()
    with zipfile.ZipFile(package) as wheel:
        return wheel.read(name)


def read_timm(timm: Path, name: str) -> list[str]:
    return read(timm, f"timm/data/_info/{name}.txt").decode("utf-8").splitlines()


def clip_ranks(open_clip: Path) -> dict[str, int]:
    """Whole-word tokens of CLIP's byte-pair encoding -> their place in the table, roughly by falling frequency."""
    lines = gzip.decompress(read(open_clip, "open_clip/bpe_simple_vocab_16e6.txt.gz")).decode("utf-8").split("\n")
    ranks: dict[str, int] = {}
    for rank, line in enumerate(lines[1 : MERGES + 1]):
        token = line.replace(" ", "")
        if token.endswith("</w>"):
            ranks.setdefault(token.removesuffix("</w>"), rank)
    return ranks


def common_nouns(timm: Path, open_clip: Path, size: int = SIZE) -> list[str]:
    """The `size` names, in alphabetical order. The rules are in the module's docstring."""
    lemmas = dict(line.split("\t") for line in read_timm(timm, "imagenet_synset_to_lemma"))
    definitions = dict(line.split("\t") for line in read_timm(timm, "imagenet_synset_to_definition"))
    imagenet_1k = set(read_timm(timm, "imagenet_synsets"))
    pictured = set(read_timm(timm, "imagenet12k_synsets")) & set(read_timm(timm, "imagenet21k_miil_w21_synsets"))
    ranks = clip_ranks(open_clip)
    excluded = {*UNCLEAR.split(), *HURTFUL.split(", ")}
    used, order = set(), {}
    for synset in sorted(pictured | imagenet_1k):
        name = lemmas[synset].split(",")[0].strip()
        in_category = any(first <= int(synset[1:]) < end for first, end in CATEGORIES)
        if not in_category or not NAME.fullmatch(name) or PERSON.match(definitions[synset]):
            continue
        # A word CLIP knows only in pieces ranks behind all that it knows.
        rank = max(ranks.get(word, MERGES) for word in name.replace("'s", "").replace("s'", "s").split())
        if synset not in imagenet_1k and rank == MERGES:
            continue
        if name in excluded:
            used.add(name)
            continue
        key = name.replace(" ", "")
        order[key] = min(order.get(key, ((9, 0), "")), ((_group(name, synset in imagenet_1k), rank), name))
    if excluded - used:
        raise ValueError(f"Excluded by hand, but no candidate: {sorted(excluded - used)}; remove them from the list.")
    if len(order) < size:
        raise ValueError(f"Only {len(order)} names pass the rules, {size} are wanted; lower --size.")
    return sorted(name for _, name in sorted(order.values())[:size])


def _group(name: str, in_imagenet_1k: bool) -> int:
    return 0 if in_imagenet_1k else 1 if " " not in name else 2


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("timm", type=Path, help="timm's wheel, or the site-packages folder it is installed in")
    parser.add_argument("open_clip", type=Path, help="open_clip_torch's wheel, or such a folder")
    parser.add_argument("--size", type=int, default=SIZE, help="number of names (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="file to write (default: the shipped one)")
    parser.add_argument("--overwrite", action="store_true", help="replace the file if it differs")
    options = parser.parse_args(arguments)
    try:
        names = common_nouns(options.timm, options.open_clip, options.size)
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        sys.exit(f"Cannot build from {options.timm} and {options.open_clip}: {error}")
    text = HEADER.format(count=len(names)) + "\n".join(names) + "\n"
    if options.output.exists() and options.output.read_text(encoding="utf-8") == text:
        print(f"{options.output}: unchanged, {len(names)} names")
        return
    if options.output.exists() and not options.overwrite:
        sys.exit(f"{options.output} exists and differs; pass --overwrite or another --output.")
    temporary = options.output.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, options.output)
    print(f"{options.output}: {len(names)} names")


if __name__ == "__main__":
    main()
