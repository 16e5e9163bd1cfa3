"""Reading lists of videos: each format as its data set has it, and what happens to lines that make no sense."""

import io
import json
import os
import tarfile
import time

import pytest

from xclip_fast.data.manifest import Manifest, index
from xclip_fast.data.manifest.labels import read_labels
from xclip_fast.data.manifest.listing import Place, Request
from xclip_fast.data.manifest.sources import read_source

ODD_NAMES = [
    b"line\nend.mp4",
    b"tab\there.mp4",
    b'it\'s "quoted".mp4',
    b"-leading.mp4",
    b" spaces .mp4",
    b"bytes\xff\xfe.mp4",
    "кошка \N{GRINNING FACE}.mp4".encode(),
    b"x" * 251 + b".mp4",
    b"a{1..2},b.mp4",
]


def touch(path, text=""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def found(listing):
    return [(entry.path, entry.label) for entry in listing.entries]


def errors(listing):
    return {entry.path: entry.error for entry in listing.entries if entry.error}


def make_tar(path, members):
    """A tar of (name, bytes or TarInfo) pairs; written by the standard library, not by what is tested."""
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            if isinstance(content, tarfile.TarInfo):
                content.name = name
                tar.addfile(content)
            else:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


# ---- folders


def test_folder_per_class(tmp_path):
    for name in ("riding_a_bike/b.MP4", "riding_a_bike/deep/er/a.webm", "archery/1.avi", "archery/.hidden.mp4"):
        touch(tmp_path / name)
    touch(tmp_path / "archery/notes.txt")
    (tmp_path / "archery/folder.mp4").mkdir()
    listing = read_source(tmp_path)
    assert listing.classes == ("archery", "riding a bike")
    assert found(listing) == [
        ("archery/1.avi", 0),
        ("archery/folder.mp4", 0),
        ("riding_a_bike/b.MP4", 1),
        ("riding_a_bike/deep/er/a.webm", 1),
    ]
    assert "1 .txt" in listing.notes[0]


def test_class_folders_with_labels_given(tmp_path):
    for name in ("b_c/1.mp4", "a/1.mp4"):
        touch(tmp_path / name)
    (tmp_path / "empty").mkdir()
    listing = read_source(tmp_path, labels=["zebra", "b c", "a", "empty"])
    assert listing.classes == ("zebra", "b c", "a", "empty")
    assert found(listing) == [("a/1.mp4", 2), ("b_c/1.mp4", 1)]
    assert "'empty' holds no video" in listing.notes[0]
    with pytest.raises(ValueError, match="class 'b_c' is not in the labels"):
        read_source(tmp_path, labels=["a", "empty"])


def test_two_folders_of_one_name_stay_two_classes(tmp_path):
    touch(tmp_path / "a b/1.mp4")
    touch(tmp_path / "a_b/1.mp4")
    assert read_source(tmp_path).classes == ("a b", "a_b")


def test_folders_of_splits(tmp_path):
    touch(tmp_path / "train/run/1.mp4")
    touch(tmp_path / "val/run/2.mp4")
    with pytest.raises(ValueError, match=r"splits \(train, val\).*--split train"):
        read_source(tmp_path)
    listing = read_source(tmp_path, split="val")
    assert (listing.root, listing.classes, found(listing)) == (tmp_path / "val", ("run",), [("run/2.mp4", 0)])
    with pytest.raises(ValueError, match="has no split 'test'"):
        read_source(tmp_path, split="test")


def test_flat_and_mixed_folders(tmp_path):
    touch(tmp_path / "b.mp4")
    touch(tmp_path / "a.mp4")
    listing = read_source(tmp_path)
    assert (listing.classes, found(listing)) == ((), [("a.mp4", None), ("b.mp4", None)])
    touch(tmp_path / "more/c.mp4")
    with pytest.raises(ValueError, match=r"2 outside of them.*--format flat"):
        read_source(tmp_path)
    assert len(read_source(tmp_path, format="flat").entries) == 3
    touch(tmp_path / "more/d.mp4")
    listing = read_source(tmp_path)  # fewer loose videos than others are rows with an error
    assert listing.classes == ("more",)
    assert errors(listing) == dict.fromkeys(["a.mp4", "b.mp4"], "lies outside of the class folders")


@pytest.mark.parametrize("name", ODD_NAMES)
def test_odd_names(name, tmp_path):
    folder = os.fsencode(tmp_path) + b"/class\n\xff"
    os.mkdir(folder)
    with open(folder + b"/" + name, "w"):
        pass
    (entry,) = read_source(tmp_path).entries
    assert os.fsencode(entry.path) == b"class\n\xff/" + name


def test_links(tmp_path):
    data = tmp_path / "data"
    touch(data / "a/real.mp4")
    touch(tmp_path / "outside/class/1.mp4")
    (data / "b").symlink_to(tmp_path / "outside")
    (data / "a/loop").symlink_to(data)
    (data / "a/self.mp4").symlink_to(data / "a/self.mp4")
    (data / "self").symlink_to("self")
    listing = read_source(data)
    assert [entry.path for entry in listing.entries] == ["a/loop", "a/real.mp4", "a/self.mp4", "b"]
    assert set(errors(listing)) == {"a/loop", "b"}
    assert "follow_links=True" in errors(listing)["b"]
    listing = read_source(data, follow_links=True)
    assert [entry.path for entry in listing.entries] == ["a/loop", "a/real.mp4", "a/self.mp4", "b/class/1.mp4"]
    assert errors(listing) == {"a/loop": "is a link to one of its own parent folders"}


# ---- a path and a label on each line


def labels_csv(tmp_path, text="id,name\n0,eating\n1,riding a bike\n"):
    return touch(tmp_path / "labels.csv", text)


def test_lines(tmp_path):
    text = "\ufeffa.mp4 0\r\n\nriding a bike/v 1.mp4 1\nsub/../b.mp4\t0\n./c 2 1\nline\x0bsep\x85.mp4  1  \n"
    listing = read_source(touch(tmp_path / "train.txt", text), labels=labels_csv(tmp_path))
    assert listing.classes == ("eating", "riding a bike")
    assert found(listing) == [
        ("a.mp4", 0),
        ("riding a bike/v 1.mp4", 1),
        ("b.mp4", 0),
        ("c 2", 1),
        ("line\x0bsep\x85.mp4", 1),
    ]


def test_lines_with_bytes_that_are_no_text(tmp_path):
    path = tmp_path / "list.txt"
    path.write_bytes(b"\xff\xfe.mp4 1\n")
    (entry,) = read_source(path, labels=["a", "b"]).entries
    assert os.fsencode(entry.path) == b"\xff\xfe.mp4"


def test_lines_without_labels(tmp_path):
    listing = read_source(touch(tmp_path / "list.txt", "a b.mp4\nc.webm\n"))
    assert found(listing) == [("a b.mp4", None), ("c.webm", None)]


def test_lines_repeat_as_the_list_does(tmp_path):
    listing = read_source(touch(tmp_path / "l.txt", "a.mp4 1\na.mp4 0\na.mp4 1\n"), labels=["x", "y"])
    assert found(listing) == [("a.mp4", 1), ("a.mp4", 0), ("a.mp4", 1)]


@pytest.mark.parametrize("path", ["../x.mp4", "a/../../x.mp4", "/etc/x.mp4", "..", "/"])
def test_lines_that_lead_out_of_the_root(path, tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    listing = read_source(touch(tmp_path / "l.txt", f"ok.mp4 0\n{path} 0\n"), labels=["x"], root=root)
    assert list(errors(listing)) == [path]
    assert "lies outside of the root folder" in errors(listing)[path]


def test_absolute_paths_below_the_root_are_fine(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    text = f"{tmp_path}/link/a.mp4 0\n{tmp_path}/real/b.mp4 0\n{tmp_path}/really.mp4 0\n"
    listing = read_source(touch(tmp_path / "l.txt", text), labels=["x"], root=tmp_path / "link")
    assert [entry.path for entry in listing.entries][:2] == ["a.mp4", "b.mp4"]
    assert len(errors(listing)) == 1
    assert listing.root == tmp_path / "real"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.mp4 0\nb.mp4 2\n", "line 2: label 2 is not one of the 2 classes"),
        ("a.mp4 -1\n", "line 1: label -1"),
        ("a.mp4 0\n\nb.mp4 zero\n", "line 3: a path, a space"),
        ("a.mp4 0\nb.mp4\n", "line 2: a path, a space"),
        ("a.mp4\nb.mp4 0\n", "line 2: a path, a space"),
        ("a.mp4 0 1\n", "line 1: two fields wanted.*got a third"),
        ("a b.mp4 30 1\n", "line 1: two fields wanted.*got a third"),
        ("a.mp4,0.5,1\n", "line 1: two fields wanted.*got a third"),
        ("\n \n", "has no video"),
        ("a\0b 1\n", "is not a list of videos"),
    ],
)
def test_lines_that_make_no_sense(text, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        read_source(touch(tmp_path / "list.txt", text), labels=["a", "b"])


@pytest.mark.parametrize("separator", [" ", "\t", ",", ";", " ; "])
@pytest.mark.parametrize("name", ["train.csv", "train.tsv", "train.txt"])
def test_lists_by_content(name, separator, tmp_path):
    """A csv of paths and ids was refused for its suffix."""
    path = touch(tmp_path / name, f"my run/a.mp4{separator}1\nb.mp4{separator}0\n")
    assert found(read_source(path, labels=["x", "y"])) == [("my run/a.mp4", 1), ("b.mp4", 0)]


def test_a_missing_file_is_not_served_by_another(tmp_path):
    touch(tmp_path / "clip.mp4")
    path = touch(tmp_path / "list.txt", "clip.mp4 1 0\nclip.avi 0\n")
    with pytest.raises(ValueError, match="got a third"):
        read_source(path, labels=["x"])
    place = Place(Request(path))
    assert place.entry("clip.mp4 1", 0).path == "clip.mp4 1"  # it was clip.mp4
    assert place.entry("clip.avi", 0).path == "clip.mp4"  # a copy


def test_names_in_another_unicode_composition(tmp_path):
    """A list written on another system, with accents apart from their letters or not."""
    apart, joined = "cafe\u0301", "caf\u00e9"
    for there, listed in ((apart, joined), (joined, apart)):
        root = tmp_path / str(len(there))
        touch(root / there / f"{there}.mp4")
        path = touch(root / "list.txt", f"{listed}/{listed}.mp4 0\n{listed}/{listed}.avi 0\n{listed}/none.mp4 0\n")
        paths = [entry.path for entry in read_source(path, labels=["x"]).entries]
        assert paths == [f"{there}/{there}.mp4", f"{there}/{there}.mp4", f"{listed}/none.mp4"]


@pytest.mark.parametrize("what", ["labels", "list"])
def test_lists_that_are_pipes_or_devices(what, tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    for path in (tmp_path / "pipe.txt", "/dev/zero"):
        with pytest.raises(ValueError, match="a regular file is wanted"):
            read_labels(path) if what == "labels" else read_source(path)
    os.mkfifo(tmp_path / "manifest.jsonl.partial")
    with pytest.raises(ValueError, match="is a pipe"):
        index(tmp_path)


def test_ids_need_names(tmp_path):
    with pytest.raises(ValueError, match=r"line 1: has the id 7 for a label; give the names"):
        read_source(touch(tmp_path / "list.txt", "a.mp4 7\n"))


# ---- names of classes


def test_labels(tmp_path):
    assert read_labels(labels_csv(tmp_path, 'name,id\n"b, c",1\na,0\n')) == ("a", "b, c")
    assert read_labels(labels_csv(tmp_path, "0,x\n1,y\n")) == ("x", "y")
    assert read_labels(labels_csv(tmp_path, "\ufeffName\nx\ny\n")) == ("x", "y")
    for separator in ",;\t":
        text = separator.join(["id", "name"]) + f'\n1{separator}"a{separator}b"\n0{separator}c, d; e f\n'
        text = text if separator == "\t" else text.replace("c, d; e f", '"c, d; e f"')
        assert read_labels(labels_csv(tmp_path, text)) == ("c, d; e f", f"a{separator}b")
    assert read_labels(labels_csv(tmp_path, "swimming\nrunning\n")) == ("swimming", "running")
    assert read_labels(labels_csv(tmp_path, "x;Class;y\n9;a;9\n9;b;9\n")) == ("a", "b")
    (tmp_path / "latin.csv").write_bytes(b"id;name\n0;caf\xe9\n")
    with pytest.raises(ValueError, match="is not UTF-8 text"):
        read_labels(tmp_path / "latin.csv")
    assert read_labels(touch(tmp_path / "l.txt", "riding a bike\n\n eating \r\n")) == ("riding a bike", "eating")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id,name\n0,a\n2,b\n", "1 is missing"),
        ("id,name\n0,a\n0,b\n", "line 3: the id 0 occurs twice"),
        ("id,name\nx,a\n", "line 2: a whole number and a name are wanted"),
        ("id,name\n0\n", "line 2: has 1 columns and the first line 2"),
        ("id,name\n0,a\n1,a\n", "class 'a' occurs twice"),
        ("what,ever\n0,a\n", "line 1: the header id,name"),
        ("id,name\n", "no class names"),
        ("", "no class names"),
    ],
)
def test_labels_that_make_no_sense(text, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        read_labels(labels_csv(tmp_path, text))


# ---- official lists

KINETICS = """label,youtube_id,time_start,time_end,split
abseiling,-3B32lodo2M,59,69,train
"massaging, feet",0347ZoDXyP0,95,105,train
abseiling,_ab-cd_ef_1,0,10,validate
testifying,not__there0,5,15,train
"""


@pytest.mark.parametrize("layout", ["{name}", "{split}/{label}/{name}", "{under}/{name}", "videos/{id}.mp4"])
def test_kinetics(layout, tmp_path):
    for label, key, start, end, split in (
        ("abseiling", "-3B32lodo2M", 59, 69, "train"),
        ("massaging, feet", "0347ZoDXyP0", 95, 105, "train"),
        ("abseiling", "_ab-cd_ef_1", 0, 10, "val"),
    ):
        name = f"{key}_{start:06d}_{end:06d}.mp4"
        place = layout.format(name=name, split=split, label=label, under=label.replace(" ", "_"), id=key)
        touch(tmp_path / "data" / place)
    path = touch(tmp_path / "k.csv", KINETICS)
    listing = read_source(path, root=tmp_path / "data")
    assert listing.classes == ("abseiling", "massaging, feet", "testifying")
    assert [entry.label for entry in listing.entries] == [0, 1, 0, 2]
    assert all((listing.root / entry.path).is_file() for entry in listing.entries[:3])
    assert [os.path.basename(entry.path)[:11] for entry in listing.entries[:3]] == [
        "-3B32lodo2M",
        "0347ZoDXyP0",
        "_ab-cd_ef_1",
    ]
    assert listing.entries[3].path == "not__there0_000005_000015.mp4"
    assert "no file of that name" in listing.entries[3].error
    assert [entry.label for entry in read_source(path, root=tmp_path / "data", split="val").entries] == [0]


def test_kinetics_prefers_the_copy_of_its_split(tmp_path):
    for split in ("train", "validate"):
        touch(tmp_path / split / "-3B32lodo2M_000059_000069.mp4")
    path = touch(tmp_path / "k.csv", KINETICS.split("\n0347")[0].split('\n"')[0])
    assert found(read_source(path)) == [("train/-3B32lodo2M_000059_000069.mp4", 0)]


def test_kinetics_with_labels_and_without(tmp_path):
    path = touch(tmp_path / "k.csv", KINETICS)
    names = ["zz", "testifying", "massaging, feet", "abseiling"]
    assert [entry.label for entry in read_source(path, labels=names).entries] == [3, 2, 3, 1]
    with pytest.raises(ValueError, match="class 'testifying' is not in the labels"):
        read_source(path, labels=names[2:])
    test = touch(tmp_path / "test.csv", "youtube_id,time_start,time_end,split\nx,0,10,test\n")
    assert [entry.label for entry in read_source(test).entries] == [None]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("label,youtube_id,time_start\n", "must have time_end"),
        (KINETICS + "a,b,c,d,e\n", "line 6: label,.* wanted"),
        (KINETICS + "a,b,1\n", "line 6: label,.* wanted"),
        ("path,label\nx.mp4,0\n", "is not a csv of Kinetics"),
    ],
)
def test_kinetics_that_makes_no_sense(text, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        read_source(touch(tmp_path / "k.csv", text))


@pytest.fixture
def ucf(tmp_path):
    lists = tmp_path / "ucfTrainTestlist"
    touch(lists / "classInd.txt", "1 ApplyEyeMakeup\r\n2 YoYo\r\n")
    touch(lists / "trainlist01.txt", "ApplyEyeMakeup/v_a_g08_c01.avi 1\r\nYoYo/v_y_g08_c01.avi 2\r\n")
    touch(lists / "testlist01.txt", "YoYo/v_y_g01_c01.avi\n")
    touch(tmp_path / "UCF-101/ApplyEyeMakeup/v_a_g08_c01.avi")
    return lists


def test_ucf101(ucf, tmp_path):
    listing = read_source(ucf / "trainlist01.txt")
    assert (listing.classes, listing.root) == (("Apply Eye Makeup", "Yo Yo"), tmp_path / "UCF-101")
    assert found(listing) == [("ApplyEyeMakeup/v_a_g08_c01.avi", 0), ("YoYo/v_y_g08_c01.avi", 1)]
    assert read_source(ucf, split="train1") == listing
    assert found(read_source(ucf, split="test1")) == [("YoYo/v_y_g01_c01.avi", 1)]
    assert found(read_source(ucf, split="test1", labels=["YoYo", "ApplyEyeMakeup"])) == [("YoYo/v_y_g01_c01.avi", 0)]
    with pytest.raises(ValueError, match="--split train1"):
        read_source(ucf)
    with pytest.raises(FileNotFoundError):
        read_source(ucf, split="train3")


def test_transcoded_copies_stand_in_for_listed_files(ucf):
    listing = read_source(ucf, split="test1")
    touch(listing.root / "YoYo/v_y_g01_c01.mp4")
    assert found(read_source(ucf, split="test1")) == [("YoYo/v_y_g01_c01.mp4", 1)]
    touch(listing.root / "YoYo/v_y_g01_c01.avi")
    assert found(read_source(ucf, split="test1")) == [("YoYo/v_y_g01_c01.avi", 1)]


@pytest.mark.parametrize("line", ["YoYo/x.avi 1", "YoYo/x.avi 3", "No/x.avi 1", "x.avi 1", "../YoYo/x.avi 2"])
def test_ucf101_lines_that_contradict_the_classes(line, ucf):
    (ucf / "trainlist01.txt").write_text(line)
    if line.startswith(".."):
        assert errors(read_source(ucf, split="train1"))
        return
    with pytest.raises(ValueError, match=r"line 1: Class/file\.avi and its id"):
        read_source(ucf, split="train1")


@pytest.mark.parametrize("flat", [False, True])
def test_hmdb51(flat, tmp_path):
    splits = tmp_path / "testTrainMulti_7030_splits"
    touch(splits / "brush_hair_test_split1.txt", "#20 (a) & b;_0.avi 1 \nx.avi 2 \ny.avi 0 \n")
    touch(splits / "wave_test_split1.txt", "w.avi 1 \n")
    touch(splits / "wave_test_split2.txt", "w.avi 2 \n")
    home = tmp_path / "hmdb51"
    touch(home / ("#20 (a) & b;_0.avi" if flat else "brush_hair/#20 (a) & b;_0.avi"))
    listing = read_source(splits, split="train1", root=home)
    assert listing.classes == ("brush hair", "wave")
    folder = ("", "") if flat else ("brush_hair/", "wave/")
    assert found(listing) == [(f"{folder[0]}#20 (a) & b;_0.avi", 0), (f"{folder[1]}w.avi", 1)]
    assert [entry.label for entry in read_source(splits, split="test1", root=home).entries] == [0]
    if not flat:
        assert read_source(splits, split="train1") == listing
    with pytest.raises(ValueError, match="--split train1"):
        read_source(splits)
    touch(splits / "wave_test_split1.txt", "w.avi 3 \n")
    with pytest.raises(ValueError, match=r"wave_test_split1.txt, line 1: name.avi and 0, 1 or 2 wanted"):
        read_source(splits, split="train1")


# ---- tar


def test_webdataset(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    with webdataset.TarWriter(str(tmp_path / "s-0.tar")) as writer:
        writer.write({"__key__": "clips/one", "mp4": b"1" * 700, "cls": 1})
        writer.write({"__key__": "clips/two", "mp4": b"2" * 5, "json": {"label": 0}})
    listing = read_source(tmp_path / "s-0.tar", labels=["a", "b"])
    assert [(entry.member, entry.label, entry.size) for entry in listing.entries] == [
        ("clips/one.mp4", 1, 700),
        ("clips/two.mp4", 0, 5),
    ]
    data = (tmp_path / "s-0.tar").read_bytes()
    assert [data[entry.offset :][: entry.size] for entry in listing.entries] == [b"1" * 700, b"2" * 5]


def test_labels_in_tars(tmp_path):
    members = [
        ("./0.0.cls", b"run"),  # the key is ./0, the suffix 0.cls: no label of 0.mp4
        ("./0.mp4", b"x"),
        ("./0.txt", b" run \n"),
        ("./1.seg.mp4", b"x"),
        ("./1.json", b'{"label": "walk", "fps": 3}'),
        ("./1.txt", b"a caption that the json goes before"),
        ("./2.cls", b"walk"),
        ("./2.MP4", b"x"),
        ("./2.webm", b"x"),
        ("./3.mp4", b"x"),
        ("./3.json", b'{"caption": "nothing here"}'),
    ]
    make_tar(tmp_path / "a.tar", members)
    listing = read_source(tmp_path)
    assert listing.classes == ("run", "walk")
    assert [(entry.member, entry.label) for entry in listing.entries] == [
        ("./0.mp4", 0),
        ("./1.seg.mp4", 1),
        ("./2.MP4", 1),
        ("./2.webm", 1),
        ("./3.mp4", None),
    ]


def test_tar_of_class_folders(tmp_path):
    make_tar(tmp_path / "a.tar", [("ucf/run/1.mp4", b"x"), ("ucf/long_jump/2.mp4", b"x"), ("ucf/run/deep/3.mp4", b"x")])
    listing = read_source(tmp_path / "a.tar")
    assert listing.classes == ("long_jump", "run")
    assert [entry.label for entry in listing.entries] == [1, 0, 1]
    make_tar(tmp_path / "a.tar", [("run/1.mp4", b"x"), ("2.mp4", b"x")])
    assert [entry.label for entry in read_source(tmp_path / "a.tar").entries] == [None, None]


def test_patterns_of_shards(tmp_path):
    for number in (8, 9, 10):
        make_tar(tmp_path / f"t-{number:03d}.tar", [(f"{number}.mp4", b"x"), (f"{number}.txt", b"run")])
    listing = read_source(tmp_path / "t-{008..011}.tar")
    assert [(entry.path, entry.member) for entry in listing.entries] == [
        ("t-008.tar", "8.mp4"),
        ("t-009.tar", "9.mp4"),
        ("t-010.tar", "10.mp4"),
        ("t-011.tar", None),
    ]
    assert "No such file" in listing.entries[3].error
    assert len(read_source(tmp_path / "t-{008,010}.tar").entries) == 2
    with pytest.raises(ValueError, match="must count upwards"):
        read_source(tmp_path / "t-{9..1}.tar")
    with pytest.raises(FileNotFoundError):
        read_source(tmp_path / "t-1.tar")


def test_members_that_are_no_files(tmp_path):
    def info(kind, to=""):
        member = tarfile.TarInfo()
        member.type, member.linkname = kind, to
        return member

    members = [
        ("../../etc/out.mp4", b"x"),
        ("/abs.mp4", b"x"),
        ("sym.mp4", info(tarfile.SYMTYPE, "/etc/passwd")),
        ("hard.mp4", info(tarfile.LNKTYPE, "../../etc/out.mp4")),
        ("fifo.mp4", info(tarfile.FIFOTYPE)),
        ("dev.mp4", info(tarfile.CHRTYPE)),
        ("folder.mp4", info(tarfile.DIRTYPE)),
        ("empty.mp4", b""),
        (f"{'long/' * 60}x.mp4", b"y"),
        ("line\nend\udcff.mp4", b"z"),
    ]
    make_tar(tmp_path / "a.tar", members)
    entries = {entry.member: entry for entry in read_source(tmp_path / "a.tar").entries}
    assert entries["sym.mp4"].error == entries["hard.mp4"].error == "is a link in the tar file, not a file"
    assert entries["fifo.mp4"].error == entries["dev.mp4"].error == "is a device or pipe in the tar file, not a file"
    assert "zero bytes" in entries["empty.mp4"].error
    data = (tmp_path / "a.tar").read_bytes()
    for name, content in members[:2] + members[8:]:
        entry = entries[name]
        assert (entry.error, data[entry.offset :][: entry.size]) == (None, content)
    assert not (tmp_path.parent / "etc").exists()
    assert "folder.mp4" not in entries


def test_sparse_members(tmp_path):
    """A GNU sparse header by hand: its data has holes that are not in the file."""
    member = tarfile.TarInfo("s.mp4")
    member.type, member.size = tarfile.GNUTYPE_SPARSE, 512
    header = bytearray(member.tobuf(tarfile.GNU_FORMAT))
    header[386:410] = b"%011o\0%011o\0" % (4096, 512)
    header[483:495] = b"%011o\0" % 8192
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    (tmp_path / "a.tar").write_bytes(bytes(header) + b"d" * 512 + bytes(1024))
    (entry,) = read_source(tmp_path / "a.tar").entries
    assert "sparse" in entry.error


def test_compressed_tars_are_refused(tmp_path):
    for name, mode, tool in (("a.tar.gz", "w:gz", "gzip"), ("b.tar", "w:bz2", "bzip2"), ("c.tgz", "w:gz", "gzip")):
        with tarfile.open(tmp_path / name, mode):
            pass
        with pytest.raises(ValueError, match=f"uncompress it first: {tool} -d"):
            read_source(tmp_path / name)
    with pytest.raises(ValueError, match="is compressed"):
        read_source(tmp_path)


@pytest.mark.parametrize("cut", [100, 1024, 1200, 1536 + 700])
def test_truncated_tars(cut, tmp_path):
    path = make_tar(tmp_path / "a.tar", [("0.mp4", b"x" * 512), ("1.mp4", b"y" * 1024)])
    path.write_bytes(path.read_bytes()[:cut])
    listing = read_source(path)
    assert listing.entries[-1].error
    assert all(entry.error is None for entry in listing.entries[:-2])
    assert [entry.member for entry in listing.entries] == {
        100: [None],
        1024: ["0.mp4", None],
        1200: ["0.mp4", None],
        2236: ["0.mp4", "1.mp4", None],
    }[cut]


def test_tars_damaged_inside_or_put_together(tmp_path):
    path = make_tar(tmp_path / "a.tar", [("0.mp4", b"x" * 512), ("1.mp4", b"y" * 1024)])
    data = path.read_bytes()
    path.write_bytes(data[:1030] + b"?" + data[1031:])
    assert [entry.member for entry in read_source(path).entries] == ["0.mp4", None]
    assert errors(read_source(path)) == {
        "a.tar": "the tar file is damaged or cut off at byte 1024; the rest is not read"
    }
    path.write_bytes(data + data)
    assert "goes on after its end mark" in errors(read_source(path))["a.tar"]


@pytest.mark.parametrize(
    "content", [b"{", b"\xff", json.dumps({"label": [1]}).encode(), b'{"label": true}', b"[" * 60000, b"[" * 70000]
)
def test_labels_that_cannot_be_read(content, tmp_path):
    make_tar(tmp_path / "a.tar", [("0.mp4", b"x"), ("0.json", content), ("1.mp4", b"x"), ("1.txt", b"run")])
    listing = read_source(tmp_path)
    assert "its label in 0.json cannot be read" in listing.entries[0].error
    assert (listing.entries[1].label, listing.entries[1].error) == (0, None)


def test_unknown_labels_in_tars(tmp_path):
    make_tar(tmp_path / "a.tar", [("0.mp4", b"x"), ("0.cls", b"2")])
    with pytest.raises(ValueError, match=r"a.tar:0.mp4: label 2 is not one of the 2 classes"):
        read_source(tmp_path, labels=["a", "b"])
    with pytest.raises(ValueError, match="give the names"):
        read_source(tmp_path)


# ---- which format


def test_what_is_no_list(tmp_path):
    video = touch(tmp_path / "a.mp4")
    with pytest.raises(ValueError, match="is not a list of videos"):
        read_source(video)
    manifest = touch(tmp_path / "manifest.jsonl", '{"xclip_fast_manifest": 2}')
    with pytest.raises(ValueError, match="is a manifest already"):
        read_source(manifest)
    with pytest.raises(ValueError, match="format is 'nothing'; it must be one of folder"):
        read_source(tmp_path, format="nothing")
    with pytest.raises(ValueError, match="it must be an existing folder"):
        read_source(tmp_path, root=tmp_path / "no")
    with pytest.raises(ValueError, match="the root of a folder is the folder itself"):
        read_source(tmp_path, root=tmp_path)
    with pytest.raises(FileNotFoundError):
        read_source(tmp_path / "no.txt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="has no video"):
        read_source(tmp_path / "empty")


@pytest.mark.parametrize("format", ["folder", "flat", "lines", "kinetics", "ucf101", "hmdb51", "tar"])
def test_a_wrong_format_is_an_error(format, tmp_path):
    source = touch(tmp_path / "list", "something else entirely\n")
    if format == "tar":  # a shard that is none is a row
        assert list(errors(read_source(source, format=format))) == ["list"]
        return
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        read_source(source, format=format, split="train1" if format == "hmdb51" else None)
    assert str(tmp_path) in str(error.value)


def member(name, data=b"x" * 100, size=None):
    """A tar member; `size` as its header states it, in the base-256 form that can be negative."""
    header = bytearray(tarfile.TarInfo(name).tobuf(tarfile.USTAR_FORMAT))
    stated = len(data) if size is None else size
    header[124:136] = (b"\xff" if stated < 0 else b"\x80") + (stated % 256**11).to_bytes(11, "big")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + data + bytes(-len(data) % 512)


@pytest.mark.parametrize("size", [-512, -1024, -(2**60), 2**62])
def test_a_tar_member_of_an_impossible_size(size, tmp_path):
    """At a size of -512, `tarfile` of some Python versions reads the same header without end."""
    (tmp_path / "a.tar").write_bytes(member("0.mp4") + member("1.mp4", size=size) + member("2.mp4") + bytes(1024))
    begun = time.monotonic()
    listing = read_source(tmp_path / "a.tar")
    assert time.monotonic() - begun < 2
    assert [entry.member for entry in listing.entries if entry.error is None] == ["0.mp4"]
    assert any(entry.error for entry in listing.entries)
    manifest = index(tmp_path / "a.tar", workers=0)
    assert Manifest.read(tmp_path / "a.tar.manifest.jsonl") == manifest


def test_one_label_of_a_tar_that_is_no_class(tmp_path):
    data = b"".join(member(f"{n}.mp4") + member(f"{n}.cls", str(label).encode()) for n, label in enumerate([0, 7, 1]))
    (tmp_path / "a.tar").write_bytes(data + bytes(1024))
    listing = read_source(tmp_path / "a.tar", labels=["x", "y"])
    assert [entry.label for entry in listing.entries] == [0, None, 1]
    assert [entry.error for entry in listing.entries] == [None, "its label 7 is not one of the 2 classes", None]
