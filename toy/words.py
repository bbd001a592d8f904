"""The prompts of the toy task, and the words that are single tokens in its body's tokenizer."""

from words import JudgeWords, SimWords, Words

from .world import BEASTS, COLOURS, ENDINGS, NAMES, RELATIONS, SHOWN, STEMS, UNKNOWN

WORDS = Words(prompt="Question: {question}\n", notice="\n\nSearch or answer.\n\n", system=None)
TURNS = 4  # in which an episode may search, before the last
ORDER = "Question: {question}{earlier}\nQuery: {query}\nAnswer: {answer}\n"
SIM_WORDS = SimWords("", ORDER + "Useful:\n", ORDER + "Noisy:\n", SHOWN, "\nQuery: {query}\n{documents}")
# The body continues this with the fact that the query asks for, or with "unknown", which means no.
JUDGE = JudgeWords("<information>{documents}</information>\n\n<think> {query}", r"\w", r"\bunknown\b")
END = "<|end|>"
TAGS = [f"<{slash}{tag}>" for tag in ("think", "search", "information", "answer") for slash in ("", "/")]
LABELS = ["Question:", "\nAnswer:", "\nQuery:", "\nUseful:", "\nNoisy:", "Doc 1:"]
LABELS += [f"\nDoc {i}:" for i in range(1, 7)]
# Words that the BPE merges make single tokens; shared parts come first.
LEXICON = [end for ends in ENDINGS.values() for end in ends] + [" " + stem for stem in STEMS]
LEXICON += [" " + word for word in [*NAMES, *RELATIONS, *COLOURS, *BEASTS, UNKNOWN]]
LEXICON += ["\n\n", "Search", " or", " answer"]
