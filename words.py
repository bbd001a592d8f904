"""All prompts: those of the policy, the baselines, the simulator and the judge of collected documents.

Prompts are data. For a policy or simulator trained elsewhere, pass its prompts as a JSON file
(--policy-prompt, --sim-prompt); a simulator's adapter is saved with the prompts that it was trained on. The
toy task's are in toy/words.py.

Not the code that talks to a model: rollout.py fills these templates in for the policy, simulator.py for the
simulator, prepare/collect.py for the judge.

Source: ZeroSearch, arXiv 2505.04588, for what the prompts contain; the wording is our own.
"""

import json
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from cli.disk import read_json, whole


def fill(template: str, **values: str) -> str:
    """Replace each {name} by its value, in one pass, so that braces inside a value are left alone."""
    names = "|".join(map(re.escape, values))
    return re.sub(r"\{(" + names + r")\}", lambda m: values[m[1]], template)


# ------------------------------------------------------------------------------------------------- the policy


@dataclass(frozen=True)
class Words:
    """The policy's prompts. The tags that they mention are fixed; the text around them is free."""

    prompt: str  # a template of {question}, and for --mode rag of {documents}
    notice: str = ""  # follows a turn that neither searched nor answered
    system: str | None = None


WORDS = Words(
    prompt="""\
You answer questions with the help of a search engine.
Whenever you receive new information, first reason about it between <think> and </think>.
If you lack some knowledge, write a query between <search> and </search>: the engine then returns what it \
found between <information> and </information>. You may search as often as you want.
Once you need nothing more, give the answer between <answer> and </answer>, in as few words as possible and \
without an explanation, for example <answer> Beijing </answer>.
Question: {question}
""",
    notice="""
That was not a valid action. To search, put a query between <search> and </search>; \
to finish, put the answer between <answer> and </answer>. Try again.
""",
)
ANSWER_FORM = " between <answer> and </answer>, in as few words as possible and without an explanation.\n"
MODE_WORDS = {  # the search agent, and the paper's baselines (evaluation/modes.py)
    "agent": WORDS,
    "direct": Words(f"Answer the question{ANSWER_FORM}Question: {{question}}\n"),
    "cot": Words(
        "Reason step by step between <think> and </think>. Then give the answer to the question"
        f"{ANSWER_FORM}Question: {{question}}\n"
    ),
    "rag": Words(
        f"Answer the question{ANSWER_FORM}A search engine has found what stands between <information> and "
        "</information>; not all of it need be of use.\n"
        "<information>{documents}</information>\nQuestion: {question}\n"
    ),
}


SHORT_WORDS = Words(prompt="{question}", system="")  # for a small body that a cold start has shown the form
POLICY_WORDS_FILE = "policy_prompt.json"  # in the directory of an adapter


def load_policy_words(path: str | Path) -> Words:
    """`short`, or a JSON file {"prompt", "notice"}, "system" optional. Raises ValueError for another file."""
    if path == "short":
        return SHORT_WORDS
    words = _read(Words, path, "policy", "prompt", "notice")
    if "{question}" not in words.prompt:
        raise ValueError(f"{path}: prompt must contain {{question}}")
    return words


def _read(kind: type, path: str | Path, role: str, *needed: str) -> "Words | SimWords":
    """Prompts from a JSON file. An unknown key is an error, so that no prompt is silently ignored."""
    words, known = read_json(Path(path), f"a directory of {role} prompts"), [f.name for f in fields(kind)]
    if not {*needed} <= words.keys() <= {*known}:
        more = " and ".join(name for name in known if name not in needed)
        raise ValueError(f"{path} must hold {' and '.join(needed)}, may hold {more}, and no other keys")
    for name, value in words.items():
        if type(value) is not (wanted := int if name == "count" else str):
            raise ValueError(f"{path}: {name} must be of type {wanted.__name__}")
    return kind(**words)


# ---------------------------------------------------------------------------------------------- the simulator

TASK = """\
You are a search engine, and the query at the end has just reached you. Write five {quality} documents for \
it, the ones that you would return: """
USEFUL = TASK + "they are about what the query asks, and whoever reads them can answer it."
NOISY = TASK + "they look related to the query, but whoever reads them still cannot answer it."
BACKGROUND = """\
What the user is after (for your eyes only):
Question: {question}
Correct answer: {answer}"""
FORM = """\
A document is a passage of about 30 words, in the manner of an encyclopedia or a web page. Put each on a \
line of its own, numbered "Doc 1: ..." to "Doc 5: ...", and write nothing else. All five documents must be \
{quality}."""
ASK = """\
Query: {query}
{Quality} Output:
"""
USEFUL_EXAMPLE = """\
Here is an example.
Question: Which river flows through the capital of Slovenia?
Correct answer: Ljubljanica
Query: river in Ljubljana
Useful Output:
Doc 1: The Ljubljanica flows through the middle of Ljubljana, the capital of Slovenia, and is crossed there \
by the Triple Bridge and the Dragon Bridge before it joins the Sava east of the city.
Doc 2: Ljubljana lies between the Alps and the Adriatic. Its old town grew up between Castle Hill and the \
river Ljubljanica, whose embankments were laid out anew in the 1930s.
Doc 3: The Ljubljanica is called the river of seven names: south-west of Ljubljana it disappears into the \
karst again and again, and comes back to the surface each time under another name.
Doc 4: Boats on the Ljubljanica leave from the centre of Ljubljana, pass the covered market and the \
Cobblers' Bridge, and take about an hour for the round trip.
Doc 5: Divers have raised thousands of objects from the bed of the Ljubljanica upstream of Ljubljana, among \
them Roman swords, Bronze Age helmets and medieval tools.

Now it is your turn."""
NOISY_EXAMPLE = """\
Here is an example.
Query: river in Ljubljana
Noisy Output:
Doc 1: Ljubljana became the capital of independent Slovenia in 1991. It has about 300,000 inhabitants, a \
university founded in 1919, and a castle on a wooded hill above the old town.
Doc 2: The Danube passes through four capitals, Vienna, Bratislava, Budapest and Belgrade, on its way from \
the Black Forest to the Black Sea, more than any other river.
Doc 3: Legend has it that Ljubljana was founded by Jason, who killed a dragon in a marsh nearby. The dragon \
has stood in the city's coat of arms ever since.
Doc 4: Slovenia is a land of forests and caves. Postojna Cave, 24 kilometres long, has been shown to \
visitors since 1819 and is toured on an electric train.
Doc 5: The Ljubljana Marathon is run each October. Its course starts and ends in the city centre and draws \
runners from dozens of countries.

Now it is your turn."""


@dataclass(frozen=True)
class SimWords:
    """The simulator's prompts: a system message and two complete user messages, one for each quality.

    `useful` and `noisy` are templates of {query}, {question}, {answer} and {earlier}; {query} is required,
    other braces are literal. Without a chat template in the tokenizer, the texts themselves are the prompt.
    `count` is the number of documents that they ask for. {earlier} becomes one copy of the template of that
    name, filled with {query} and {documents}, for each earlier search of the episode, oldest first.
    Raises ValueError for a template without {query}, or a count below 1.
    """

    system: str
    useful: str
    noisy: str
    count: int = 5
    earlier: str = "Query: {query}\n{documents}\n\n"

    def __post_init__(self):
        for name in ("useful", "noisy"):
            if "{query}" not in getattr(self, name):
                raise ValueError(f"the simulator's {name} prompt has no {{query}}: where does the query go?")
        if self.count < 1:
            raise ValueError(f"a simulator must write at least one document, not {self.count}")


def _compose(quality: str, *blocks: str) -> str:
    text = "\n\n".join(blocks)
    return text.replace("{quality}", quality).replace("{Quality}", quality.capitalize())


# What changes from query to query comes last: prompts that begin alike are fed to the cache once (engine.py).
# For a fine-tuned simulator: both prompts hold question and answer, neither an example.
SFT_WORDS = SimWords(
    system="",
    useful=_compose("useful", USEFUL, FORM, BACKGROUND, ASK),
    noisy=_compose("noisy", NOISY, FORM, BACKGROUND, ASK),
)
# For an LLM without fine-tuning: a worked example in each. A model never trained to withhold an answer does
# it best when it does not know the answer, so the noisy prompt holds neither question nor answer.
PROMPTED_WORDS = SimWords(
    system="",
    useful=_compose("useful", USEFUL, FORM, USEFUL_EXAMPLE, BACKGROUND, ASK),
    noisy=_compose("noisy", NOISY, FORM, NOISY_EXAMPLE, ASK),
)
# For a small body without fine-tuning: one sentence, asked for in as many words as it can follow.
SHORT_SIM_WORDS = SimWords(
    system="",
    useful='Query: {query}\nWrite one sentence about "{question}" that contains the words "{answer}".',
    noisy='Write one sentence about "{query}".',
    count=1,
)
NAMED_WORDS = {"sft": SFT_WORDS, "prompted": PROMPTED_WORDS, "short": SHORT_SIM_WORDS}


def load_words(source: str | Path) -> SimWords:
    """`sft`, `prompted`, `short`, or a JSON file {"system", "useful", "noisy"}, maybe "count" and "earlier".
    Raises ValueError for any other file."""
    if source in NAMED_WORDS:
        return NAMED_WORDS[source]
    return _read(SimWords, source, "simulator", "system", "useful", "noisy")


def save_words(words: Words | SimWords, path: str | Path) -> None:
    """Write what `load_words` or `load_policy_words` reads: an adapter is saved with the prompts that it was
    trained on."""
    said = {name: value for name, value in asdict(words).items() if value is not None}
    with whole(path) as part:
        part.write_text(json.dumps(said, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


WORDS_FILE = "sim_prompt.json"  # in the directory of an adapter


def words_for(adapter: str, named: str, usual: SimWords = PROMPTED_WORDS) -> SimWords:
    """The prompts that `named` names, if any; else those saved with the adapter; else `usual`."""
    if named:
        return load_words(named)
    return load_words(Path(adapter) / WORDS_FILE) if adapter else usual


# -------------------------------------------------------------------------------------------------- the judge


@dataclass(frozen=True)
class JudgeWords:
    """A prompt of {query}, {question} and {documents}, and the patterns of the two verdicts in the reply."""

    prompt: str
    yes: str = r"(?i)\byes\b"
    no: str = r"(?i)\bno\b"


JUDGE = JudgeWords("""\
Below is a search query, and what a search engine returned for it.
Query: {query}
{documents}

Do these documents hold enough information to answer the query? Reply with one word, Yes or No.
Reply:""")
