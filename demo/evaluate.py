"""Ask a checkpoint folder about fresh drawings, through phi3v: python demo/evaluate.py [--model demo] [--count 3000].

An answer counts if it is exact, to the character. Of a conversation the last answer counts; those before are the
model's own. A task's cases are drawn until there are enough of it, none of them seen in training (another seed).
"""

import argparse
import collections
import random
import time

import phi3v

phi3v.fast_blas()

import scenes  # noqa: E402

from phi3v.request import Chat, Picture, Request, SamplingParams  # noqa: E402

# The shares of the cases, and what the task is to reach, in %.
TASKS = {"describe": (9, 95), "count": (8, 97), "colour": (4, 98), "shape": (4, 98), "yes/no": (4, 98)}
TASKS |= {"where": (7, 95), "size": (4, 95), "words": (7, 97), "strings": (9, 85), "numbers": (7, 95)}
TASKS |= {"lines": (4, 85), "digits": (4, 95), "charts": (9, 98), "receipts": (7, 90), "pictures": (10, 95)}
TASKS |= {"follow-up": (7, 95), "text": (10, 100), "unknown": (3, 95)}
BATCH = 24


def cases(count: int, seed: int):
    """(task, pictures, turns), so many of each task as its share."""
    rng, total = random.Random(seed), sum(share for share, _ in TASKS.values())
    left = {task: round(count * share / total) for task, (share, _) in TASKS.items()}
    while any(left.values()):
        if rng.random() < 0.1:
            drawings, talk = [], lambda: scenes.plain(rng)
        elif rng.random() < 0.15:
            drawings, talk = scenes.several(rng, rng.choice([2, 2, 3]))
        else:
            drawings = [scenes.one(rng)]
            talk = drawings[0].talk
        task, turns = talk()
        if left[task]:
            left[task] -= 1
            yield task, [drawing.image for drawing in drawings], turns


def answers(llm, batch: list) -> list[str]:
    """The last answer of each conversation."""
    said = [[] for _ in batch]
    for turn in range(max(len(turns) for _, _, turns in batch)):
        asked = [k for k, (_, _, turns) in enumerate(batch) if turn < len(turns)]
        chats = []
        for k in asked:
            _, pictures, turns = batch[k]
            messages = [("user", [part for i in range(1, len(pictures) + 1) for part in (-i, "\n")] + [turns[0][0]])]
            for answer, (question, _) in zip(said[k], turns[1:], strict=False):
                messages += [("assistant", [answer]), ("user", [question])]
            chats.append(Chat(messages, [Picture(picture) for picture in pictures]))
        texts = collections.defaultdict(str)
        with llm.answer(Request(chats, SamplingParams(max_tokens=120))) as deltas:
            for delta in deltas:
                texts[delta.index] += delta.text
        for i, k in enumerate(asked):
            said[k].append(texts[i])
    return [turns[-1] for turns in said]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo", help="a checkpoint folder")
    parser.add_argument("--count", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=20_000_003)
    parser.add_argument("--wrong", type=int, default=3, help="wrong answers shown of each task")
    args = parser.parse_args()
    right, asked, shown = collections.Counter(), collections.Counter(), collections.Counter()
    began, batch = time.time(), []
    with phi3v.load(args.model) as llm:
        for case in [*cases(args.count, args.seed), None]:
            batch += [case] if case else []
            if not batch or (case and len(batch) < BATCH):
                continue
            for (task, _, turns), answer in zip(batch, answers(llm, batch), strict=True):
                asked[task] += 1
                right[task] += answer == turns[-1][1]
                if answer != turns[-1][1] and (shown := shown + collections.Counter([task]))[task] <= args.wrong:
                    print(f"{task}: {turns[-1][0]!r} → {answer!r}, not {turns[-1][1]!r}", flush=True)
            batch = []
    print("| task | exact | % | to reach |\n|---|---|---|---|")
    for task, (_, goal) in TASKS.items():
        share = 100 * right[task] / max(1, asked[task])
        told = f"{goal}" if share >= goal else f"{goal}, missed"
        print(f"| {task} | {right[task]:,} of {asked[task]:,} | {share:.1f} | {told} |")
    total, number = sum(right.values()), sum(asked.values())
    print(f"| all | {total:,} of {number:,} | {100 * total / number:.1f} | |\n\n{time.time() - began:.0f} s")


if __name__ == "__main__":
    main()
