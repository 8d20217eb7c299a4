"""Reading the sentences: the archive in memory, the label rule, and a split that leaks nothing."""

import hashlib
import io
import tarfile

import pytest
from demo_problems import CACHE, lines, tar, write_archive

from fedlora_kernels.demo.data import (
    ARCHIVE,
    DOMAINS,
    INNER,
    SHA256,
    Domain,
    Sentence,
    checksum_note,
    find_archive,
    label,
    read_domains,
)
from fedlora_kernels.errors import FormatError, InputError


@pytest.mark.parametrize(
    ("rating", "answer"),
    [(0.3, 1), (4.0, 1), (0.29999, None), (0.0, None), (-0.29999, None), (-0.3, 0), (-4.0, 0)],
)
def test_label_is_the_sign_of_a_rating_far_enough_from_neutral(rating, answer):
    assert label(rating, 0.3) == answer


def test_reads_every_domain_and_leaves_out_neutral_sentences(tmp_path):
    domains = read_domains(write_archive(tmp_path / "a.tar.gz"))
    assert list(domains) == list(DOMAINS)
    for name, domain in domains.items():
        ratings = [float(line.split("\t")[1]) for line in lines(name, 60).split("\r\n") if line]
        assert len(domain.train) + len(domain.test) == sum(abs(r) >= 0.3 for r in ratings)
        positive = sum(s.label for s in domain.train + domain.test)
        assert positive == sum(r >= 0.3 for r in ratings)
        assert not any(s.text.endswith("\r") for s in domain.train + domain.test)


def test_no_words_of_a_test_set_occur_in_any_training_set(tmp_path):
    # the same sentence in other capitals and punctuation, twice in one domain and once in another
    shared = "\r\n".join(f"{i}\t1.0\tWord{i}, good film!" for i in range(200))
    again = "\r\n".join(f"{i}\t1.0\tWORD{i} good FILM" for i in range(200))
    texts = {"tweets": f"{shared}\r\n{again}", "movies": again}
    domains = read_domains(write_archive(tmp_path / "a.tar.gz", texts))
    words = {name: ({s.text.lower().replace(",", "").strip("!") for s in d.train}, d) for name, d in domains.items()}
    test = {s.text.lower().replace(",", "").strip("!") for d in domains.values() for s in d.test}
    for train, _ in words.values():
        assert not train & test
    tweets = domains["tweets"]
    assert len(tweets.train) + len(tweets.test) == 200
    assert 20 <= len(tweets.test) <= 60


def test_the_split_depends_on_the_seed_and_on_nothing_else(tmp_path):
    path = write_archive(tmp_path / "a.tar.gz")
    assert read_domains(path, seed=3) == read_domains(path, seed=3)
    assert read_domains(path, seed=3)["movies"].test != read_domains(path, seed=4)["movies"].test


def test_a_prefix_of_a_side_is_a_fair_sample_of_a_sorted_file(tmp_path):
    ordered = "".join(f"{i}\t{2.0 if i < 300 else -2.0}\tfilm number {i}\r\n" for i in range(600))
    domain = read_domains(write_archive(tmp_path / "a.tar.gz", {"movies": ordered}))["movies"]
    for side in (domain.train, domain.test):
        assert 15 <= sum(s.label for s in side[:50]) <= 35


def test_majority_is_the_commoner_training_label_on_the_test_set():
    good, bad = Sentence("good", 1), Sentence("bad", 0)
    assert Domain("d", (good, good, bad), (good, bad, bad, bad)).majority == 0.25
    assert Domain("d", (good, bad, bad), (good, bad, bad, bad)).majority == 0.75


def test_a_folder_is_searched_and_a_missing_archive_names_the_command(tmp_path):
    with pytest.raises(
        InputError, match=r"no vaderSentiment-3.3.2.tar.gz in .*pip download .*vaderSentiment==3.3.2 -d"
    ):
        find_archive(tmp_path)
    path = write_archive(tmp_path / ARCHIVE)
    assert find_archive(tmp_path) == path
    assert find_archive(path) == path


def test_another_checksum_is_told(tmp_path):
    path = write_archive(tmp_path / ARCHIVE)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    note = checksum_note(path)
    assert note is not None
    assert digest in note
    assert SHA256 in note
    assert checksum_note(path, expected=digest) is None


def test_what_is_no_archive_or_lacks_a_file_is_named(tmp_path):
    path = tmp_path / "a.tar.gz"
    path.write_bytes(b"no archive at all")
    with pytest.raises(FormatError, match="not a readable"):
        read_domains(path)
    path.write_bytes(write_archive(tmp_path / "b.tar.gz").read_bytes()[:900])
    with pytest.raises(FormatError, match="not a readable"):
        read_domains(path)
    path.write_bytes(tar({"vader/setup.py": b""}))
    with pytest.raises(FormatError, match=INNER):
        read_domains(path)
    path.write_bytes(tar({f"v/{INNER}": tar({"hutto/tweets_GroundTruth.txt": lines("tweets", 5).encode()})}))
    with pytest.raises(FormatError, match=r"amazonReviewSnippets_GroundTruth\.txt"):
        read_domains(path)


def test_a_broken_line_is_named(tmp_path):
    path = write_archive(tmp_path / "a.tar.gz", {"movies": "1\t1.0\tfine\r\n2\tno rating\tbad\r\n"})
    with pytest.raises(FormatError, match=r"movieReviewSnippets_GroundTruth\.txt, line 2"):
        read_domains(path)


def test_links_in_an_archive_are_not_followed_and_nothing_is_unpacked(tmp_path):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        member = tarfile.TarInfo(f"../../{INNER}")
        member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(member)
    path = tmp_path / "a.tar.gz"
    path.write_bytes(buffer.getvalue())
    with pytest.raises(FormatError, match=INNER):
        read_domains(path)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(not (CACHE / ARCHIVE).is_file(), reason=f"no {ARCHIVE} in {CACHE}: make demo fetches it")
def test_the_real_archive_has_the_pinned_checksum_and_sizes():
    path = CACHE / ARCHIVE
    assert checksum_note(path) is None
    sizes = {name: (len(d.train), len(d.test)) for name, d in read_domains(path).items()}
    assert sizes == {"tweets": (2885, 716), "products": (2543, 616), "movies": (8328, 1988), "editorials": (2975, 689)}
