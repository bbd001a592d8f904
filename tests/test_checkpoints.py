"""Qwen2.5 and Llama-3.2, base and instruct, and Qwen3: small random checkpoints laid out like the real ones.

Vocabularies are small and made here; special tokens, patterns, post-processors, configurations and what the
templates do are those of the families.
"""

import json
from functools import partial

import pytest
import torch
from test_tokenizer import LLAMA3, QWEN2, rebuild, save, split, train
from tokenizers import normalizers, processors
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, Qwen2Config, Qwen3Config

import kernels
import tasks
import train as story
import weights
from cli import flags as flags_of
from cli.setting import load
from engine import Engine
from model import POLICY, SIMULATOR
from prepare import command as preparing
from prepare.rows import write_rows
from prepare.sft import end_of_turn
from rollout import Limits, Query, Question, Turn, episode
from simulator import Simulator, prompt
from tokenizer import Tokenizer
from words import WORDS, WORDS_FILE, SimWords, Words, save_words

QWEN_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>"]
QWEN_SPECIAL += ["<|box_start|>", "<|box_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"]
QWEN_PLAIN = [
    "<tool_call>",
    "</tool_call>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
]
LLAMA_SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>"]
LLAMA_SPECIAL += ["<|finetune_right_pad_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>"]
LLAMA_SPECIAL += ["<|eot_id|>", "<|python_tag|>"]
# What the real templates do: a default system message, branches for tools, a generation prompt.
QWEN_TEMPLATE = """\
{%- if tools %}{{- raise_exception('no tools here') }}{%- endif %}
{%- if messages[0]['role'] != 'system' %}
    {{- '<|im_start|>system\\nSYSTEM<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
# Qwen3's has no default system message; it drops the thoughts of earlier turns, and a switch closes the next.
QWEN3_TEMPLATE = """\
{%- if tools %}{{- raise_exception('no tools here') }}{%- endif %}
{%- for message in messages %}
    {%- set content = message.content %}
    {%- if message.role == 'assistant' and '</think>' in content %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""
LLAMA_TEMPLATE = """\
{{- bos_token }}
{%- if not date_string is defined %}{%- set date_string = strftime_now("%d %b %Y") %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] | trim %}{%- set messages = messages[1:] %}
{%- else %}{%- set system = "" %}{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- "Today: " + date_string + "\\n\\n" + system + "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}
"""
SHAPE = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=2048, initializer_range=0.2,
)  # fmt: skip
ROPE = dict(
    rope_type="llama3", factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=512, rope_theta=500000.0,
)  # fmt: skip


def save_random(path, config) -> str:
    """A random body of that configuration, saved as transformers does."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(path)
    return str(path)


def qwen(path, instruct: bool, three: bool = False) -> str:
    """Both have a template; the base's end is its pad; the embedding has more rows than the tokenizer. Qwen3
    has tokens for thoughts, which are not special."""
    plain = [*QWEN_PLAIN, "<think>", "</think>"] if three else QWEN_PLAIN
    backend = train(split(QWEN2), QWEN_SPECIAL, plain, normalizers.NFC())
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    ids = {t: backend.token_to_id(t) for t in QWEN_SPECIAL}
    size = backend.get_vocab_size() + 11
    pad, end = "<|endoftext|>", "<|im_end|>" if instruct else "<|endoftext|>"
    config = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": end, "pad_token": pad, "bos_token": None}
    config |= {"add_bos_token": False, "split_special_tokens": False}
    ends = [ids["<|im_end|>"], ids[pad]] if instruct else ids[pad]
    same = {"bos_token_id": ids[pad], "eos_token_id": ids[end]}
    more = {"head_dim": 16} if three else {}
    shape = (Qwen3Config if three else Qwen2Config)(**SHAPE, **same, **more, vocab_size=size)
    shape.tie_word_embeddings = True
    save_random(path, shape)
    template = QWEN3_TEMPLATE if three else QWEN_TEMPLATE.replace("SYSTEM", "You are a helpful assistant.")
    return save(
        backend, path, config | {"chat_template": template},
        generation_config={"eos_token_id": ends, "pad_token_id": ids[pad], "temperature": 0.7, "top_p": 0.8},
    )  # fmt: skip


def llama(path, instruct: bool) -> str:
    """The instruct one has a template, three ends and a pad of its own; the base one has neither."""
    backend = rebuild(train(split(LLAMA3), LLAMA_SPECIAL), ignore_merges=True)
    ids = {t: backend.token_to_id(t) for t in LLAMA_SPECIAL}
    begin = ("<|begin_of_text|>", ids["<|begin_of_text|>"])
    bos = processors.TemplateProcessing(single=f"{begin[0]} $A", special_tokens=[begin])
    backend.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), bos])
    size = backend.get_vocab_size()
    end = "<|eot_id|>" if instruct else "<|end_of_text|>"
    config = {"bos_token": begin[0], "eos_token": end}
    ends = [ids[t] for t in ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")] if instruct else ids[end]
    if instruct:
        config |= {"chat_template": LLAMA_TEMPLATE, "pad_token": "<|finetune_right_pad_id|>"}
    same = {"bos_token_id": begin[1], "eos_token_id": ends}
    save_random(
        path, LlamaConfig(**SHAPE, **same, vocab_size=size, tie_word_embeddings=True, rope_parameters=ROPE)
    )
    return save(backend, path, config, generation_config=same)


KINDS = {
    "qwen-instruct": (qwen, True),
    "qwen-base": (qwen, False),
    "qwen3": (partial(qwen, three=True), True),
    "llama-instruct": (llama, True),
    "llama-base": (llama, False),
}


@pytest.fixture(scope="module")
def homes(tmp_path_factory):
    """The directories of all checkpoints."""
    return {k: make(tmp_path_factory.mktemp(k), instruct) for k, (make, instruct) in KINDS.items()}


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def loaded(homes, kind):
    return weights.load(homes[kind]), Tokenizer.load(homes[kind])


SIM_WORDS = SimWords("", "useful {query}?", "noisy {query}?", count=2)
HEAD = "<|start_header_id|>{}<|end_header_id|>\n\n"
SYSTEM = HEAD.format("system") + "Today: 26 Jul 2024\n\n<|eot_id|>"
TOLD = {  # the policy's prompt, the simulator's
    "qwen-instruct": (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nQ who?<|im_end|>\n<|im_start|>assistant\n",
        "<|im_start|>system\n<|im_end|>\n<|im_start|>user\nuseful it?<|im_end|>\n<|im_start|>assistant\n",
    ),
    "qwen3": (
        "<|im_start|>user\nQ who?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
        "<|im_start|>system\n<|im_end|>\n<|im_start|>user\nuseful it?<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\n",
    ),
    "llama-instruct": (
        f"<|begin_of_text|>{SYSTEM}{HEAD.format('user')}Q who?<|eot_id|>{HEAD.format('assistant')}",
        f"<|begin_of_text|>{SYSTEM}{HEAD.format('user')}useful it?<|eot_id|>{HEAD.format('assistant')}",
    ),
    "llama-base": ("<|begin_of_text|>Q who?", "<|begin_of_text|>useful it?"),
}
TOLD["qwen-base"] = TOLD["qwen-instruct"]
IT = Query("it", Question("who", ("Ann",)), (0, 0, 0, 0, 0))


def test_prompts_are_in_the_checkpoints_own_layout(loaded, kind):
    """Without its template an instruct model rambles; with one, or with two bos, a base model is off its
    training. The simulator's system message is empty, not the template's default. Qwen3 would think before it
    writes documents, or takes our tags: it has thought."""
    from rollout import prompt as policy_prompt

    tok = loaded[1]
    assert tok.has_template == (kind != "llama-base")
    ids = policy_prompt(IT.question, tok, Words(prompt="Q {question}", notice=""))
    asked = prompt(tok, SIM_WORDS, IT, False)
    assert (tok.decode(ids), tok.decode(asked)) == TOLD[kind]
    special = set(tok.special.values())
    for text, sequence in zip(TOLD[kind], (ids, asked)):
        assert sum(i in special for i in sequence) == text.count("<|")  # each is one token, not its letters


ENDS = {
    "qwen-instruct": {"<|im_end|>", "<|endoftext|>"},
    "qwen-base": {"<|im_end|>", "<|endoftext|>"},
    "qwen3": {"<|im_end|>", "<|endoftext|>"},
    "llama-instruct": {"<|eot_id|>", "<|end_of_text|>", "<|eom_id|>"},
    "llama-base": {"<|eot_id|>", "<|end_of_text|>"},
}


def scripted(monkeypatch, vocab: int, script: list[int]):
    """Bodies of that vocabulary sample the script, others what they would."""
    real = kernels.sample

    def sample(logits, u, temperature):
        ids, logps = real(logits, u, temperature)
        if logits.size(-1) == vocab:
            ids = torch.tensor([script.pop(0) for _ in ids])
        return ids, logps

    monkeypatch.setattr(kernels, "sample", sample)


def test_a_turn_ends_at_each_end_and_at_no_pad(loaded, kind, monkeypatch):
    """Defect 6: pad as meaning. Where pad is an end (Qwen's base) it must end the turn and be trained; where
    it is not (Llama's instruct) it is a token like any other; a reserved token ends nothing."""
    body, tok = loaded
    assert {tok.decode([i]) for i in tok.eos} == ENDS[kind]
    word, others = tok.encode("a")[0], set(tok.special.values()) - tok.eos
    for end in sorted(tok.eos):
        scripted(monkeypatch, body.config.vocab, [word, *sorted(others), end, word])
        engine = Engine({POLICY: (body, tok)}, 1, 64)
        sampled = engine.run([turn(tok, 40)])[0]
        assert sampled.end == "eos" and sampled.ids == [word, *sorted(others), end]
        monkeypatch.undo()


def turn(tok, limit, role=POLICY, text="Q"):
    """A generator of one greedy turn."""
    return (yield Turn(tok.chat([{"role": "user", "content": text}]), role, limit, 0.0, (), (0,)))


def test_greedy_text_equals_transformers(homes, loaded, kind):
    """From the prompt's template to the last token: what transformers would write with the same files."""
    body, tok = loaded
    theirs = AutoModelForCausalLM.from_pretrained(homes[kind], dtype=torch.float32).eval()
    ids = tok.chat([{"role": "user", "content": "Who wrote the search?"}])
    options = {"do_sample": False, "temperature": None, "top_p": None, "eos_token_id": sorted(tok.eos)}
    want = theirs.generate(torch.tensor([ids]), max_new_tokens=20, **options)[0, len(ids) :].tolist()
    engine = Engine({POLICY: (body, tok)}, 1, 128)
    got = engine.run([turn(tok, 20, text="Who wrote the search?")])[0].ids
    assert got == want[: len(got)] and len(got) == len(want)


def test_base_prompts_equal_transformers(homes, loaded, kind):
    """Raw text where there is no template: bos where transformers puts it, and nothing else."""
    tok, hf = loaded[1], AutoTokenizer.from_pretrained(homes[kind])
    if not tok.has_template:
        assert tok.chat([{"role": "user", "content": "Who wrote it"}]) == hf("Who wrote it")["input_ids"]
    assert (tok.bos is not None) == kind.startswith("llama")


def test_a_row_ends_as_the_family_ends_a_turn(loaded, kind):
    """A simulator that was taught another end than its template's writes on to its limit."""
    tok = loaded[1]
    end = tok.decode([end_of_turn(tok)])
    wanted = {"llama-base": "<|end_of_text|>", "llama-instruct": "<|eot_id|>"}
    assert end == wanted.get(kind, "<|im_end|>")


@pytest.mark.parametrize("sim", ["qwen-instruct", "llama-base"])
def test_two_bodies_with_different_tokenizers(homes, sim, monkeypatch):
    """A released simulator is a body of its own: what it writes reaches the policy as text, in the policy's
    ids; its end of turn, a special token here and letters there, stays behind."""
    policy = {"qwen-instruct": "llama-instruct", "llama-base": "qwen-base"}[sim]
    bodies = {POLICY: policy, SIMULATOR: sim}
    bodies = {role: (weights.load(homes[k]), Tokenizer.load(homes[k])) for role, k in bodies.items()}
    body, tok = bodies[POLICY]
    other, their = bodies[SIMULATOR]
    assert body.config.vocab != other.config.vocab
    says = tok.encode("<search>it</search>") + tok.encode("<answer>Ann</answer>")
    end = end_of_turn(their)
    written = [*their.encode("Doc 1: Ann\nDoc 2: Bob"), end]
    feed = {body.config.vocab: says, other.config.vocab: written}
    real = kernels.sample

    def sample(logits, u, temperature):
        ids, logps = real(logits, u, temperature)
        return torch.tensor([feed[logits.size(-1)].pop(0) for _ in ids]), logps

    monkeypatch.setattr(kernels, "sample", sample)
    asked = []
    simulated = Simulator(their, SIM_WORDS)

    def search(query):
        run = simulated(query)
        asked.append(next(run))
        sampled = yield asked[0]
        try:
            run.send(sampled)
        except StopIteration as done:
            return done.value

    engine = Engine(bodies, 2, 512)
    assert engine.pools[POLICY] is not engine.pools[SIMULATOR]
    words = Words(prompt="Q {question}", notice="")
    t = engine.run([episode(IT.question, search, tok, Limits(64, 256, 40, 60, 2), words)])[0]
    assert t.answer == "Ann" and t.searches[0][1].text == "Doc 1: Ann\nDoc 2: Bob"
    assert asked[0].ids == their.chat(
        [{"role": "system", "content": ""}, {"role": "user", "content": "useful it?"}]
    )
    given = tok.decode([i for i, m in zip(t.ids, t.mask) if not m])
    assert "<information>Doc 1: Ann\nDoc 2: Bob</information>" in given
    assert tok.encode("Doc 1: Ann\nDoc 2: Bob") == _within(t.ids, tok.encode("Doc 1: Ann\nDoc 2: Bob"))


def _within(ids: list[int], part: list[int]) -> list[int] | None:
    return next((part for i in range(len(ids)) if ids[i : i + len(part)] == part), None)


def test_fine_tuning_and_audit_on_a_real_layout(homes, tmp_path, monkeypatch, capsys):
    """The commands on a checkpoint by path: an adapter, its words, held-out figures before and after; then
    the adapter by its path, and the body with its full weights alone."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "words.json").write_text(
        json.dumps({"system": "", "useful": "U {query}", "noisy": "N {query}"})
    )
    rows = [
        {
            "query": f"q{i}",
            "question": f"Q{i}",
            "answer": "Ann",
            "documents": "Doc 1: Ann",
            "quality": "useful",
        }
        for i in range(20)
    ]
    write_rows(rows, tmp_path / "rows.jsonl")
    home, sampled = homes["llama-instruct"], "--sim-tokens 8 --sim-prompt words.json"
    line = f"--sim {home} --rows rows.jsonl {sampled}"
    preparing.main(f"sft {line} --out a --steps 3 --lr .02 --every 3 --held 2".split())
    result = json.loads((tmp_path / "a" / "sft.json").read_text())
    assert result["held"] == 2 and result["after"]["loss"] < result["before"]["loss"]
    assert result["before"]["audit"]["useful"]["n"] == 2 == result["after"]["audit"]["noisy"]["n"]
    assert "held-out loss" in capsys.readouterr().out
    for adapter in ("--sim-adapter a", ""):
        preparing.main(f"audit {line} {adapter} --limit 3 --json f.json".split())
        assert json.loads((tmp_path / "f.json").read_text())["audit"]["useful"]["n"] == 3


def test_training_opens_another_body_with_its_adapter(homes, tmp_path):
    """--sim with weights of its own, and an adapter by path: on the policy's body, or in its ids, the
    simulator would write what nobody trained it to."""
    other = weights.load(homes["qwen-instruct"])
    other.add_role(SIMULATOR, rank=4, alpha=8.0, seed=3)
    weights.save_adapter(other, SIMULATOR, tmp_path / "adapter", homes["qwen-instruct"])
    save_words(SIM_WORDS, tmp_path / "adapter" / WORDS_FILE)
    (tmp_path / "q.jsonl").write_text('{"question": "who", "answer": "Ann"}\n')
    flags = {"policy": homes["llama-base"], "sim": homes["qwen-instruct"], "data": str(tmp_path / "q.jsonl")}
    flags |= {"sim-adapter": str(tmp_path / "adapter"), "seats": 2, "device": "cpu", "dtype": "fp32"}
    a = flags_of.settle("train", flags)
    s = load(a, tasks.kind(a.task)(a))
    theirs, their = s.bodies[SIMULATOR]
    assert theirs is not s.body and set(theirs.roles) == {SIMULATOR} and set(s.body.roles) == {POLICY}
    assert torch.equal(theirs.adapter(SIMULATOR), other.adapter(SIMULATOR))
    assert s.simulator.tok is their is not s.tok and s.simulator.words == SIM_WORDS
    assert story.write(s, [IT], noisy=False)


def test_a_template_that_refuses_is_one_clear_line(homes, tmp_path):
    """Some templates raise on a system message; a traceback of jinja says nothing of the checkpoint."""
    backend = train(split(QWEN2), ["<|endoftext|>"])
    refuse = "{{ raise_exception('System role not supported') }}"
    template = "{% if messages[0]['role'] == 'system' %}" + refuse + "{% endif %}"
    save(backend, tmp_path, {"eos_token": "<|endoftext|>", "chat_template": template})
    tok = Tokenizer.load(tmp_path)
    with pytest.raises(
        ValueError, match=f"{tmp_path} fails on system user: System role not supported"
    ) as error:
        prompt(tok, SIM_WORDS, IT, False)
    assert "\n" not in str(error.value)


def test_the_default_words_fit_every_family(loaded):
    """The policy's own instructions hold tags and braces: none may become a special token or be lost."""
    from rollout import prompt as policy_prompt

    tok = loaded[1]
    text = tok.decode(policy_prompt(IT.question, tok, WORDS))
    assert WORDS.prompt.replace("{question}", "who?").strip() in text
