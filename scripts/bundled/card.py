"""The model card, from the figures of the corpus, the exported checkpoint and the evaluation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bundled.evaluate import DRAFT_SHAPES, EARLY

CARD = """\
# The bundled pair

Two small Llama models trained from scratch on Python's own standard library, so that everything can
be tried and tested with real text, real weights and real acceptance without a download.
{unfinished}
| | target | draft |
|---|---|---|
| parameters | {target_parameters:,} | {draft_parameters:,} |
| layers, hidden, FFN | {t[layers]}, {t[hidden]}, {t[ffn]} | {d[layers]}, {d[hidden]}, {d[ffn]} |
| heads, KV heads | {t[heads]}, {t[kv_heads]} | {d[heads]}, {d[kv_heads]} |
| held-out bits per byte | {h[target_bits_per_byte]:.3f} | {h[draft_bits_per_byte]:.3f} |
| held-out loss per token (nats) | {h[target_loss]:.3f} | {h[draft_loss]:.3f} |

Both: context 1,024 tokens, tied embeddings, bf16 weights, a byte-level BPE tokenizer of
{vocab:,} tokens that gives back every byte; `<|endoftext|>` (id 0) ends a document.

**The draft for the target**, on text neither has seen: the same most likely token at
{h[top1_agreement]:.1%} of {h[tokens]:,.0f} positions; overlap of the distributions (the chance that
a sampled draft token is accepted at temperature 1) {h[overlap]:.1%}. Along the target's own greedy
continuations of {a[prompts]} held-out prompts (256 tokens, and {a[tokens_per_prompt]} new ones) the draft's
first choice is the target's at {a[agreement]:.1%} of the tokens, which makes, in tokens a step:

| greedy drafting with | accepted draft tokens | with the bonus token |
|---|---|---|
| a chain of 4 | {a[accepted_chain_4]:.2f} | {bonus[chain_4]:.2f} |
| a chain of 6 | {a[accepted_chain_6]:.2f} | {bonus[chain_6]:.2f} |
| a fixed tree of 12 nodes, 6 deep | {a[accepted_tree_12]:.2f} | {bonus[tree_12]:.2f} |

These continuations repeat themselves, as greedy text of so small a model does, and repetition is easy to
draft: {a[repeated_share]:.0%} of their runs of 12 tokens occurred in them before. Over the first {early}
tokens of each alone, where most of what is new stands, a chain of 4 has {a[accepted_chain_4_early]:.2f}
accepted tokens a step, {bonus[chain_4_early]:.2f} with the bonus token.

## Data

The `.py` files of the standard library of CPython {c[python]}, its tests included: {c[files]:,} files,
{c[bytes]:,} bytes, {c[tokens]:,} tokens, without exact duplicates, generated tables and files that
are mostly escaped data. CPython is copyright of the Python Software Foundation and its contributors,
under the PSF License Agreement version 2 (PSF-2.0); some files of the library carry other permissive
notices of their own.

Held out as whole modules with their tests ({c[held_out_files]} files, {c[held_out_bytes]:,} bytes):
`held_out.json` lists them, so that they can be found in any Python's standard library. The figures
above are over {h[files]} of them ({h[bytes]:,} bytes), every token with up to 1,024 tokens before it
and, past a file's beginning, at least 512.

## Training

First one loop for both: the target by cross-entropy, the draft by the target's own distribution in the
same forward. {steps:,} steps, {tokens_seen:,} tokens ({epochs:.1f} epochs) of a planned {tokens:,}; bf16
autocast with fp32 weights; Muon for matrices, AdamW for embeddings and norms; peak rate {lr:g}, falling
linearly to zero over the last {decay_share:.0%}; rows of {short_len} tokens, of 1,024 in the last
{long_share:.0%}; seed {seed}; {hours:.1f} hours, most of them on one CPU core.
{distill}
    python scripts/train_bundled.py all

does all of it again: corpus, tokenizer, both stages of training, export, evaluation and this page.
Another Python version gives another corpus, and so other weights.

## Limits

They continue Python in the style of the standard library and know little else: no instructions, no
chat, no other language to speak of. What they write is often not valid or not sensible, and greedy
continuations soon fall into loops, which raises acceptance far above that of text that does not. They
may repeat passages of the standard library, with its licence. They are for trying, testing and measuring
decoding, not for use as models.
"""

DISTILL = """
Then the target was frozen and the draft learned on for {tokens_seen:,} tokens: {own_share:.0%}
of them text that the target wrote itself ({rows:,} continuations of prefixes of the training corpus,
{greedy_share:.0%} of them greedy, the others sampled at temperatures {low:g} to {high:g}), the others
from the corpus. Loss: {kl_weight:g} of KL(target || draft) and {argmax_weight:g} of the cross-entropy with
the target's most likely token; peak rate {lr:g}, falling to zero along a cosine; {minutes:.0f} minutes.
"""


def distill_text(exported: dict[str, Any]) -> str:
    distilled = exported["distill"]
    if distilled is None:
        return ""
    settings, progress = distilled["settings"], distilled["progress"]
    own = settings["own_text"]
    return DISTILL.format(
        **{k: settings[k] for k in ("own_share", "argmax_weight", "lr")},
        tokens_seen=progress["tokens_seen"],
        minutes=progress["seconds"] / 60,
        kl_weight=1 - settings["argmax_weight"],
        rows=own["rows"],
        greedy_share=own["greedy_share"],
        low=own["temperatures"][0],
        high=own["temperatures"][1],
    )


def model_card(work: Path, record: dict[str, Any]) -> str:
    """The model card from the figures of the corpus, the exported checkpoint and the evaluation."""
    exported = json.loads((work / "export.json").read_text())
    corpus = json.loads((work / "corpus.json").read_text())
    config, progress = exported["config"], exported["progress"]
    unfinished = progress["tokens_seen"] < config["tokens"]
    return CARD.format(
        unfinished="\n**Early weights of an unfinished run, for development.**\n" if unfinished else "",
        t=exported["shapes"]["target"],
        d=exported["shapes"]["draft"],
        target_parameters=record["parameters"]["target"],
        draft_parameters=record["parameters"]["draft"],
        h=record["held_out"],
        a=record["acceptance"],
        bonus={n: record["acceptance"][f"accepted_{n}"] + 1 for n in (*DRAFT_SHAPES, "chain_4_early")},
        early=EARLY,
        distill=distill_text(exported),
        c=corpus,
        epochs=progress["tokens_seen"] / corpus["tokens"],
        hours=progress["seconds"] / 3600,
        steps=progress["steps"],
        tokens_seen=progress["tokens_seen"],
        **config,
    )
