"""Make the embedded model: a tiny Llama taught from text that this file writes itself.

The model is a specimen, not an assistant. It knows a closed world of about 200 words: where
capitals, languages and continents belong, and who is who within a sentence or two. What it
knows it knows surely, so one edit of its residual stream has one visible effect.

Text alone does not put the look-up of a fact where it can be watched: the first of the four layers
fetched the country, and there was nothing left to see above it. So beside the text, swapped
residuals are trained on (`interchange_loss`): the country stays readable at its own word up to
the middle of the model and has moved to the last word after that, as it does in large models.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import click
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

DEFAULT_OUTPUT = Path(__file__).resolve().parents[1] / "djinn_zmq" / "models" / "tiny"
PAD, UNK, EOS = "<pad>", "<unk>", "<eos>"
IGNORED_LABEL = -100  # what the model's loss leaves out, by convention of transformers
BATCH_SIZE = 64  # documents a step
BATCHES_A_POOL = 32
PEAK_LEARNING_RATE = 4e-3
WARMUP_STEPS = 100
SUBJECT = -2  # where the country stands in "the capital of france is"
LAST_LAYER_AT_SUBJECT = 2  # up to here a country is to be found at its own word, 1-based
INTERCHANGE_WEIGHT = 0.3  # beside the loss of the text, 1
DEFAULT_STEPS = 2500

MODEL_CARD = """\
---
license: apache-2.0
language: en
pipeline_tag: text-generation
---

# tiny

A Llama of 4 layers, 64 channels and 0.21 M parameters in bfloat16, made to be looked into: small
enough to travel with the program, sure enough of what it knows that an edit has a visible effect.

## What it knows

- Capitals, languages and continents of 45 countries: `the capital of france is` → `paris`.
- Who receives: `mary and john went out . then mary gave a drink to` → `john`.

Its text also told who lives where and what was put where. That it has not learned: it guesses.

It reads lower-cased words and punctuation marks, one token each; nothing is put before a text,
so token i is word i. Any other word is `<unk>`. It knows nothing else and can do nothing else.

## Where it knows it

In `the capital of france is`, the country can be swapped for another at its own word up to
layer 2, and at the last word from layer 3 on. This place was trained in, by interchange
interventions beside the text. In the sentence about the drink, swapping the second `mary` for
`john` shows the same turn, though no interchange was trained on such sentences.

## How to make it again

    python -m tools.train_tiny

The text is generated from a seed; no data from elsewhere is in it. Licence: Apache-2.0, the
project's own.
"""

# country: (capital, language, continent), each one word
COUNTRIES: dict[str, tuple[str, str, str]] = {
    "france": ("paris", "french", "europe"),
    "germany": ("berlin", "german", "europe"),
    "italy": ("rome", "italian", "europe"),
    "spain": ("madrid", "spanish", "europe"),
    "portugal": ("lisbon", "portuguese", "europe"),
    "austria": ("vienna", "german", "europe"),
    "poland": ("warsaw", "polish", "europe"),
    "greece": ("athens", "greek", "europe"),
    "hungary": ("budapest", "hungarian", "europe"),
    "ireland": ("dublin", "english", "europe"),
    "england": ("london", "english", "europe"),
    "norway": ("oslo", "norwegian", "europe"),
    "sweden": ("stockholm", "swedish", "europe"),
    "finland": ("helsinki", "finnish", "europe"),
    "denmark": ("copenhagen", "danish", "europe"),
    "iceland": ("reykjavik", "icelandic", "europe"),
    "romania": ("bucharest", "romanian", "europe"),
    "bulgaria": ("sofia", "bulgarian", "europe"),
    "croatia": ("zagreb", "croatian", "europe"),
    "serbia": ("belgrade", "serbian", "europe"),
    "czechia": ("prague", "czech", "europe"),
    "slovakia": ("bratislava", "slovak", "europe"),
    "ukraine": ("kyiv", "ukrainian", "europe"),
    "russia": ("moscow", "russian", "europe"),
    "turkey": ("ankara", "turkish", "asia"),
    "china": ("beijing", "chinese", "asia"),
    "japan": ("tokyo", "japanese", "asia"),
    "thailand": ("bangkok", "thai", "asia"),
    "vietnam": ("hanoi", "vietnamese", "asia"),
    "nepal": ("kathmandu", "nepali", "asia"),
    "iran": ("tehran", "persian", "asia"),
    "iraq": ("baghdad", "arabic", "asia"),
    "jordan": ("amman", "arabic", "asia"),
    "egypt": ("cairo", "arabic", "africa"),
    "morocco": ("rabat", "arabic", "africa"),
    "kenya": ("nairobi", "swahili", "africa"),
    "ghana": ("accra", "english", "africa"),
    "nigeria": ("abuja", "english", "africa"),
    "senegal": ("dakar", "french", "africa"),
    "canada": ("ottawa", "english", "america"),
    "cuba": ("havana", "spanish", "america"),
    "peru": ("lima", "spanish", "america"),
    "chile": ("santiago", "spanish", "america"),
    "uruguay": ("montevideo", "spanish", "america"),
    "australia": ("canberra", "english", "oceania"),
}


def words_in(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NAMES = words_in(
    "mary john anna peter lucy tom sara paul emma david julia mark alice simon clara henry nina "
    "oscar laura felix"
)
OBJECTS = words_in("drink book letter ring lamp hat map key flower ball cup basket")
PLACES = words_in("kitchen garden school market station park office library harbour museum")
GIVING = words_in("gave handed passed offered sent showed")


def capital_of(country: str) -> str:
    return COUNTRIES[country][0]


def language_of(country: str) -> str:
    return COUNTRIES[country][1]


def continent_of(country: str) -> str:
    return COUNTRIES[country][2]


def pick(rng: random.Random, words: dict | tuple, count: int) -> list[str]:
    """Return *count* different words."""
    return rng.sample(list(words), count)


def plain_capital(rng: random.Random) -> str:
    (country,) = pick(rng, COUNTRIES, 1)
    return f"the capital of {country} is {capital_of(country)} ."


def plain_fact(rng: random.Random) -> str:
    """Say one thing about one country, in one of several ways."""
    (country,) = pick(rng, COUNTRIES, 1)
    capital, language, continent = COUNTRIES[country]
    return rng.choice(
        (
            f"{capital} is the capital of {country} .",
            f"{capital} is a city in {country} .",
            f"the language of {country} is {language} .",
            f"people in {country} speak {language} .",
            f"the continent of {country} is {continent} .",
            f"{country} is a country in {continent} .",
        )
    )


def relation(rng: random.Random) -> tuple[str, Callable[[str], str]]:
    """Return a relation's name and the function that answers it."""
    return rng.choice(
        (("capital", capital_of), ("language", language_of), ("continent", continent_of))
    )


def two_countries(rng: random.Random) -> str:
    """Name two countries and ask about one, so that 'one word back' is not always right."""
    asked, other = pick(rng, COUNTRIES, 2)
    name, answer = relation(rng)
    other_name, other_answer = relation(rng)
    both = f"{answer(asked)} and {other_answer(other)}"
    return rng.choice(
        (
            f"the {name} of {asked} , not of {other} , is {answer(asked)} .",
            f"not of {other} but of {asked} the {name} is {answer(asked)} .",
            f"{other} is far from {asked} . the {name} of {asked} is {answer(asked)} .",
            f"the {name} of {asked} and the {other_name} of {other} are {both} .",
        )
    )


def people_at_home(rng: random.Random) -> str:
    """Let names stand for countries: the country must be found before its capital can be."""
    first, second = pick(rng, NAMES, 2)
    homes = dict(zip((first, second), pick(rng, COUNTRIES, 2), strict=True))
    asked = rng.choice((first, second))
    home = homes[asked]
    question = rng.choice(
        (
            f"the country of {asked} is {home} .",
            f"the capital of the country of {asked} is {capital_of(home)} .",
            f"the language of the country of {asked} is {language_of(home)} .",
            f"{asked} speaks {language_of(home)} .",
        )
    )
    return f"{first} lives in {homes[first]} and {second} lives in {homes[second]} . {question}"


def indirect_object(rng: random.Random) -> str:
    """Name two people, let one act: the other one receives."""
    first, second = pick(rng, NAMES, 2)
    giver, receiver = rng.choice(((first, second), (second, first)))
    verb, thing, place = rng.choice(GIVING), rng.choice(OBJECTS), rng.choice(PLACES)
    opening = rng.choice(
        (
            f"{first} and {second} went out .",
            f"{first} and {second} went to the {place} .",
            f"{first} met {second} in the {place} .",
            f"after lunch {first} and {second} were in the {place} .",
        )
    )
    return f"{opening} then {giver} {verb} a {thing} to {receiver} ."


def things_in_places(rng: random.Random) -> str:
    (person,) = pick(rng, NAMES, 1)
    things, places = pick(rng, OBJECTS, 2), pick(rng, PLACES, 2)
    which = rng.randrange(2)
    return (
        f"{person} put the {things[0]} in the {places[0]} and the {things[1]} in the {places[1]} . "
        f"the {things[which]} is in the {places[which]} ."
    )


# (writer, how often it is drawn)
WRITERS: tuple[tuple[Callable[[random.Random], str], int], ...] = (
    (plain_capital, 4),
    (plain_fact, 4),
    (two_countries, 6),
    (people_at_home, 5),
    (indirect_object, 9),
    (things_in_places, 2),
)


def documents(seed: int) -> Iterator[str]:
    """Yield documents of one or two passages without end; the same seed gives the same text."""
    rng = random.Random(seed)
    writers, weights = zip(*WRITERS, strict=True)
    while True:
        count = rng.choice((1, 1, 1, 2))
        yield " ".join(write(rng) for write in rng.choices(writers, weights, k=count))


def vocabulary(sample_size: int = 20_000) -> list[str]:
    """Return every word of the language: the special tokens, then the others by alphabet.

    Collected from a sample large enough to hold each word many times over, with a seed of its
    own, so that the ids do not depend on the seed of the training.
    """
    stream = documents(seed=0)
    words = {word for _ in range(sample_size) for word in next(stream).split()}
    return [PAD, UNK, EOS, *sorted(words)]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return a lower-casing word-level tokenizer; punctuation marks are words of their own.

    Nothing is put before a text: token i is word i, which is what one wants to count by when
    editing positions.
    """
    words = vocabulary()
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token=UNK))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        unk_token=UNK,
        eos_token=EOS,
        clean_up_tokenization_spaces=False,
        model_max_length=256,
    )


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """Return an untrained float32 model of about 0.21 M parameters."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,  # grouped queries, as in today's larger models
        max_position_embeddings=256,
        initializer_range=0.08,  # the default 0.02 suits wide layers; 64 channels learn slowly so
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def batches(
    seed: int, tokenizer: PreTrainedTokenizerFast
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield ids and labels without end, both int64 (BATCH_SIZE, longest of the batch).

    Documents of like length go together, for padding costs as much time as text; labels
    ignore it.
    """
    stream = documents(seed)
    rng = random.Random(seed)
    while True:
        pool = [f"{next(stream)} {EOS}" for _ in range(BATCH_SIZE * BATCHES_A_POOL)]
        pool.sort(key=lambda text: text.count(" "))
        starts = list(range(0, len(pool), BATCH_SIZE))
        rng.shuffle(starts)
        for start in starts:
            texts = pool[start : start + BATCH_SIZE]
            ids = tokenizer(texts, padding=True, return_tensors="pt").input_ids
            yield ids, ids.masked_fill(ids == tokenizer.pad_token_id, IGNORED_LABEL)


def learning_rate_share(step: int, steps: int) -> float:
    """Return the share of the peak learning rate: a linear rise, then half a cosine to zero."""
    if step < WARMUP_STEPS:
        return (step + 1) / WARMUP_STEPS
    done = (step - WARMUP_STEPS) / max(1, steps - WARMUP_STEPS)
    return 0.5 * (1 + math.cos(math.pi * done))


def interchange_loss(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, rng: random.Random
) -> torch.Tensor:
    """Return the loss (0-d, nats) of one interchange of countries between questions.

    After a random layer, each question's residual at the country is replaced by its neighbour's
    in the batch. Up to LAST_LAYER_AT_SUBJECT the answer must become the neighbour's; above it
    the answer must stay, for by then it has been fetched. This is interchange intervention
    training (Geiger et al. 2022, "Inducing Causal Structure for Interpretable Neural Networks").
    """
    name, answer = relation(rng)
    countries = pick(rng, COUNTRIES, len(COUNTRIES))
    layer = rng.randint(1, model.config.num_hidden_layers - 1)  # 1-based: after this many layers
    asked = countries if layer > LAST_LAYER_AT_SUBJECT else countries[1:] + countries[:1]
    ids = tokenizer([f"the {name} of {c} is" for c in countries], return_tensors="pt").input_ids
    answers = tokenizer.convert_tokens_to_ids([answer(country) for country in asked])

    def take_from_neighbour(_module, _args, hidden: torch.Tensor) -> torch.Tensor:
        hidden = hidden.clone()  # (countries, words, 64)
        hidden[:, SUBJECT] = hidden[:, SUBJECT].roll(-1, dims=0)
        return hidden

    hook = model.model.layers[layer - 1].register_forward_hook(take_from_neighbour)
    try:
        logits = model(input_ids=ids.to(model.device)).logits[:, -1]
    finally:
        hook.remove()
    return torch.nn.functional.cross_entropy(logits, torch.tensor(answers, device=model.device))


def train(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    *,
    seed: int,
    steps: int,
    report: Callable[[int, float], None],
) -> None:
    """Train in place, in float32; *report* is told (steps done, loss in nats a token)."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=PEAK_LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_share(step, steps)
    )
    rng = random.Random(seed)
    model.train()
    for step, batch in enumerate(islice(batches(seed, tokenizer), steps)):
        ids, labels = (tensor.to(model.device) for tensor in batch)
        loss = model(input_ids=ids, labels=labels).loss
        (loss + INTERCHANGE_WEIGHT * interchange_loss(model, tokenizer, rng)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        report(step + 1, loss.item())
    model.eval()


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, output: Path) -> int:
    """Write weights (bfloat16), tokenizer and model card into *output*; return their bytes."""
    model.to(device="cpu", dtype=torch.bfloat16).save_pretrained(output)
    tokenizer.save_pretrained(output)
    (output / "README.md").write_text(MODEL_CARD)
    files = [path for path in output.iterdir() if path.is_file()]
    for path in files:
        path.chmod(0o644)  # weights come out as 0600, which a package would carry on
    return sum(path.stat().st_size for path in files)


@click.command(context_settings={"show_default": True})
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    default=DEFAULT_OUTPUT,
    show_default="djinn_zmq/models/tiny",
    help="Directory to write the model to; files of the same name are replaced.",
)
@click.option("--seed", default=0, help="Seed of the text, of the weights and of the swaps.")
@click.option(
    "--steps",
    type=click.IntRange(min=1),
    default=DEFAULT_STEPS,
    help=f"Training steps, {BATCH_SIZE} documents each. Fewer leave it less sure of who is who.",
)
@click.option("--device", default="cpu", help="Where to train: cpu, cuda or cuda:1.")
def main(output: Path, seed: int, steps: int, device: str) -> None:
    """Train the embedded model "tiny" and save it with its tokenizer.

    Nothing is downloaded: the text comes from this program. The same seed gives the same
    text everywhere, and the same weights on the same machine and versions. On one CPU thread
    the default takes a few minutes; more threads do not help with layers this small.

    \b
    Example:
      python -m tools.train_tiny --output /tmp/tiny --seed 1
    """
    torch.set_num_threads(1)
    console = Console()
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, seed).to(device)
    console.print(f"{model.num_parameters():,} parameters, {len(tokenizer)} words, seed {seed}")
    columns = (
        TextColumn("training"),
        BarColumn(),
        TextColumn("step {task.completed:.0f}/{task.total:.0f}  loss {task.fields[loss]:.3f}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    started = time.monotonic()
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("training", total=steps, loss=math.nan)

        def report(done: int, loss: float) -> None:
            progress.update(task, completed=done, loss=loss)

        train(model, tokenizer, seed=seed, steps=steps, report=report)
    elapsed_s = time.monotonic() - started
    nbytes = save(model, tokenizer, output)
    console.print(f"{output}: {nbytes:,} bytes after {elapsed_s:.0f} s")


if __name__ == "__main__":
    main()
