"""CLIP's tokenizer against the real one of OpenCLIP, text by text."""

import gzip
import html
import importlib.metadata
import importlib.util
import pickle
import random
import sys
import unicodedata

import pytest
import torch

from cllip_fast.data import load_tokenizer
from cllip_fast.errors import InputError

pytest.importorskip("ftfy")
SPECIAL = ["<start_of_text>", "<end_of_text>", "<END_OF_TEXT>", "<\u017ftart_of_text>", "<start_of_text", "</w>"]
TEXT = """a an the dog's cat it's they'll we've I'd I'm you're can't CAN'T rock'n'roll photograph of on 3D 1,234.5 C++
MÜLLER Straße İstanbul 日本語 한국어 العربية हिन्दी ελληνικά ΣΊΣΥΦΟΣ русский ไทย café naïve ½ Ⅷ ² № ™ e-mail ᾳ
http://example.com/a?b=c&d=e @user #tag $9.99 100% <b>bold</b> &amp; &lt;p&gt; &amp;amp;lt; &nbsp; &#8217; &eacute;
&#xD800; &#0; &#xFB05; ! !! !? ?! !!!... --- ___ (…) “quoted” ‘s ’t ' '' 's 'S 🙂 👩‍👩‍👧‍👦 🇩🇪
👍🏽 ❤️ Ã© â€™ ðŸ˜€ schÃ¶n"""
ODD = [*"\0\t\n\r\x1c\x85\xa0\xad\u0301\u0345\u200b\u200d\u2028\u3000\ufb01\uff26\ufeff\ufffd\ue000\U0010ffff\ud83d"]
WORDS = [*TEXT.split(), *ODD, *SPECIAL, "\x1b[31m", "\r\n", "cafe\u0301", "'\u017f", "\u0345a", ""]


@pytest.fixture(scope="module")
def peer():
    """OpenCLIP's tokenizer; the file alone needs no torchvision."""
    pytest.importorskip("regex")
    try:
        path = importlib.metadata.distribution("open_clip_torch").locate_file("open_clip/tokenizer.py")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("open_clip_torch is not installed")
    spec = importlib.util.spec_from_file_location("openclip_peer_tokenizer", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.SimpleTokenizer()


@pytest.fixture(scope="module")
def clip(peer):
    return load_tokenizer("clip")


def check_equal(clip, peer, texts, length=77):
    for text, have, want in zip(texts, clip(texts, length), peer(texts, length), strict=True):
        assert torch.equal(have, want), f"{text!r}: {have.tolist()}, expected {want.tolist()}"


def test_sizes_and_ids_are_the_peers(clip, peer):
    assert (clip.vocab_size, clip.start_id, clip.end_id) == (peer.vocab_size, peer.sot_token_id, peer.eot_token_id)
    assert clip.pad_in_text, "0 is also a sign of the vocabulary"


def test_captions_of_all_sorts(clip, peer):
    rng = random.Random(0)
    texts = ["", " ", "a"] + WORDS
    for _ in range(1500):
        words = rng.choices(WORDS, k=rng.randint(1, 12))
        texts.append("".join(word + rng.choice(["", " ", " ", "  ", "\n", "\t ", "\u00a0", "-"]) for word in words))
    check_equal(clip, peer, texts)


def test_random_characters(clip, peer):
    rng = random.Random(1)
    assigned = [c for c in map(chr, range(0x20000)) if unicodedata.category(c) not in ("Cn", "Cs")]
    latin, ascii_ = [chr(c) for c in range(0x250)], [chr(c) for c in range(128)]
    texts = ["".join(rng.choices(alphabet, k=rng.randint(1, 30))) for alphabet in (assigned, latin) for _ in range(500)]
    texts += ["".join(rng.choices(ascii_, k=rng.randint(1, 60))) for _ in range(1000)]
    texts += [html.escape("".join(rng.choices("<>&'\"xyé ;#39amplt", k=30))) for _ in range(300)]
    check_equal(clip, peer, texts)


def test_each_character_of_the_living_scripts_is_of_the_same_class(clip, peer):
    characters = [c for c in map(chr, range(0x3400)) if unicodedata.category(c) not in ("Cn", "Cs")]
    texts = [" ".join(f"a{c}a1{c}!{c}" for c in characters[i : i + 8]) for i in range(0, len(characters), 8)]
    check_equal(clip, peer, texts, 300)


def test_special_names_count_where_the_peer_sees_them(clip, peer):
    names = [*SPECIAL, "!", "a", " ", "'s"]
    texts = ["".join((x, y, z)) for x in names for y in names for z in names]
    check_equal(clip, peer, texts)
    assert clip(["<end_of_text>"], 4)[0].tolist() == [clip.start_id, clip.end_id, clip.end_id, 0]


def test_long_texts_are_cut_before_the_end_token(clip, peer):
    rng = random.Random(2)
    words = ["antidisestablishmentarianism" * 40, "a" * 999, "ab" * 500, "".join(rng.choices("aeiourst", k=1500))]
    texts = [*words, " ".join(words), "many words " * 200, "9" * 300, "?!" * 300, "日" * 300]
    for length in (1, 2, 3, 16, 77, 1000):
        check_equal(clip, peer, texts, length)
    assert (clip(texts, 77)[:, -1] == clip.end_id).all()


def test_decode(clip, peer):
    texts = ["a photo of a dog, isn't it?!", "zoë & 日本 🙂", "", "!?!"]
    for text, row in zip(texts, clip(texts, 40), strict=True):
        assert clip.decode(row) == peer.decode(peer.encode(text)).strip()
    assert clip.decode(clip(["  A Dog"], 8)[0]) == "a dog"


def test_the_last_id_that_is_not_padding_is_where_openclip_pools(clip):
    rng = random.Random(3)
    texts = ["".join(rng.choices("!?! a", k=rng.randint(0, 40))) for _ in range(300)]
    rows = clip(texts, 24)
    last = (torch.arange(24) * (rows != 0)).amax(1)
    assert torch.equal(last, rows.argmax(1)), "OpenCLIP pools at the largest id"
    assert (rows[:, 1:4] == 0).any(), "a text with the id of padding inside"


def test_saved_files_and_copies_agree(clip, tmp_path):
    clip.save(tmp_path / "merges.txt.gz")
    texts = ["a dog", "Zoë &amp; <end_of_text>"]
    for again in (load_tokenizer(tmp_path / "merges.txt.gz"), pickle.loads(pickle.dumps(clip))):
        assert again.describe() == clip.describe()
        assert torch.equal(again(texts, 12), clip(texts, 12))


def test_what_cannot_be_used_is_refused(clip, tmp_path, monkeypatch):
    path = tmp_path / "bad.txt.gz"
    for content in (b"no gzip", gzip.compress(b"version\na b\n"), clip._file[:5000]):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"bad\.txt\.gz: CLIP vocabulary"):
            load_tokenizer(path)
    clip.save(path)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "ftfy", None)
        with pytest.raises(InputError, match="needs ftfy"):
            load_tokenizer(path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="open_clip_torch, which is not installed"):
        load_tokenizer("clip")
