"""Background clips: generated, from a folder, from DAVIS. No network, no real video."""

import hashlib
import http.server
import io
import os
import struct
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from common import video_clips
from common.distracting_metaworld import background_index
from common.generated_clips import generated_clip
from common.video_clips import Clips

RED, GREEN, BLUE, WHITE = (220, 20, 20), (20, 200, 20), (20, 20, 220), (240, 240, 240)


def quadrants(height: int = 64, width: int = 64) -> np.ndarray:
    """Red top left, green top right, blue bottom left, white bottom right: shows any flip or swap."""
    picture = np.empty((height, width, 3), np.uint8)
    picture[: height // 2, : width // 2], picture[: height // 2, width // 2 :] = RED, GREEN
    picture[height // 2 :, : width // 2], picture[height // 2 :, width // 2 :] = BLUE, WHITE
    return picture


def assert_upright(frame: np.ndarray, tolerance: int = 30) -> None:
    n = len(frame)
    for (row, column), colour in {(0, 0): RED, (0, 1): GREEN, (1, 0): BLUE, (1, 1): WHITE}.items():
        middle = frame[n // 4 + row * n // 2, n // 4 + column * n // 2].astype(int)
        assert np.abs(middle - colour).max() < tolerance, (row, column, middle, colour)


def save_frames(folder: Path, grey_levels: list[int], names: list[str] | None = None) -> None:
    folder.mkdir(parents=True)
    for k, level in enumerate(grey_levels):
        Image.new("RGB", (48, 32), (level,) * 3).save(folder / (names[k] if names else f"{k:05d}.png"))


def one_line(error: pytest.ExceptionInfo) -> str:
    """The message of a SystemExit, after checking that a user sees one line and a status that is not 0."""
    message = error.value.code
    assert isinstance(message, str) and "\n" not in message and ": " in message
    return message


# --- playback ---


def test_background_index_hand_values():
    assert [background_index(1, 1, step, 4) for step in range(9)] == [1, 2, 3, 2, 1, 0, 1, 2, 3]
    assert [background_index(1, -1, step, 4) for step in range(9)] == [1, 0, 1, 2, 3, 2, 1, 0, 1]
    assert [background_index(0, -1, step, 2) for step in range(4)] == [0, 1, 0, 1]
    assert [background_index(0, direction, 7, 1) for direction in (1, -1)] == [0, 0]


@pytest.mark.parametrize("length", [2, 3, 7])
@pytest.mark.parametrize("direction", [1, -1])
def test_background_index_moves_by_one_and_shows_every_frame(length, direction):
    for start in range(length):
        shown = [background_index(start, direction, step, length) for step in range(2 * length)]
        assert shown[0] == start and set(shown) == set(range(length))
        assert {abs(b - a) for a, b in zip(shown, shown[1:])} == {1}


# --- generated clips ---


def digest(clip: np.ndarray) -> str:
    return hashlib.sha256(clip.tobytes()).hexdigest()


def test_generated_shape_and_lists():
    train, test = Clips("generated", "train", 64), Clips("generated", "test", 64)
    assert (len(train), len(test)) == (60, 30) and len(set(train.names + test.names)) == 90
    for size in (32, 48):
        clip = Clips("generated", "train", size)[3]
        assert clip.shape == (90, size, size, 3) and clip.dtype == np.uint8


GOLDEN_CLIPS = {
    ("train", 0, 32): "a580983ae3088f09418c8fb7764ece89a55aacc8084b7d31994db3ac940c4444",
    ("train", 41, 24): "574d54a69eabb425db600b7d0c7b1123ff11fd5182a7599cfc5083f91f10b797",
    ("test", 29, 32): "2b5c18f08ac951948bd7934023f2fa1ee094d306b4965d0850962a76193eb158",
}


@pytest.mark.parametrize("split, index, size", GOLDEN_CLIPS)
def test_generated_clips_are_a_fixed_data_set(split, index, size):
    assert digest(generated_clip(split, index, size)) == GOLDEN_CLIPS[split, index, size]
    assert np.array_equal(Clips("generated", split, size)[index], generated_clip(split, index, size))


def test_generated_is_the_same_in_another_process():
    program = (
        "import hashlib; from common.video_clips import Clips; "
        "print(hashlib.sha256(Clips('generated', 'test', 32)[5].tobytes()).hexdigest())"
    )
    environ = os.environ | {"PYTHONHASHSEED": "7"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environ, capture_output=True, text=True
    )
    assert done.stdout.split()[-1] == digest(Clips("generated", "test", 32)[5])


def test_no_two_generated_clips_are_alike():
    """Over both splits: also not the same scene a few frames later (by the nearest of some frames)."""
    clips = [generated_clip(split, i, 32) for split in ("train", "test") for i in range(12)]
    assert len({digest(clip) for clip in clips}) == len(clips)
    few = np.stack([clip[::10] for clip in clips]).reshape(len(clips), 9, -1).astype(np.float32)
    for i in range(len(clips)):
        for j in range(i):
            assert np.abs(few[i][:, None] - few[j][None]).mean(axis=-1).min() > 15, (i, j)


def test_generated_clips_move_smoothly():
    motion = []
    for i in range(12):
        clip = generated_clip("train", i, 64).astype(np.float32)
        lag1, lag10 = (np.abs(clip[lag:] - clip[:-lag]).mean(axis=(1, 2, 3)) for lag in (1, 10))
        assert lag10.mean() > 2 * lag1.mean()
        spike = lag1[1:-1] - np.maximum(
            lag1[:-2], lag1[2:]
        )  # a cut, or a thing that pops up, is a change in one step only
        assert spike.max() < 0.15 * np.median(lag1)
        assert lag1.min() > 0.5, "a frozen frame"
        motion.append(lag1.mean())
    assert 3.4 < np.median(motion) < 12  # four hand-held videos of people and pets: 1.6 to 5.5, median 3.4


def test_things_move_everywhere_in_the_frame():
    """Every region changes, the upper part and the sides (seen behind the robot) as much as the rest."""
    clips = [generated_clip("train", i, 32).astype(np.float32) for i in range(8)]
    change = np.mean([np.abs(np.diff(clip, axis=0)).mean(axis=(0, 3)) for clip in clips], axis=0)
    regions = change.reshape(4, 8, 4, 8).mean(axis=(1, 3))
    assert regions.min() > 0.5 * regions.max()


# --- folders ---


def test_folder_is_split_by_name(tmp_path):
    for k in range(7):
        save_frames(tmp_path / f"clip{k}", [10 * k, 10 * k + 5])
    (tmp_path / "notes.txt").write_text("not a clip")
    train, test = Clips(str(tmp_path), "train", 16), Clips(str(tmp_path), "test", 16)
    assert train.names == ["clip0", "clip1", "clip2", "clip3", "clip4"] and test.names == ["clip5", "clip6"]
    assert train[2].shape == (2, 16, 16, 3) and train[2][:, 8, 8, 0].tolist() == [20, 25]
    assert test[-1][0, 0, 0].tolist() == [60, 60, 60]
    with pytest.raises(IndexError):
        test[2]


@pytest.mark.parametrize("count, train", [(2, 1), (3, 2), (4, 3)])
def test_both_splits_have_a_clip(tmp_path, count, train):
    for k in range(count):
        save_frames(tmp_path / f"clip{k}", [k])
    assert [len(Clips(str(tmp_path), split, 16)) for split in ("train", "test")] == [train, count - train]


@pytest.mark.parametrize("name", ["a.mp4", "a.AVI", "a.mov"])
def test_video_file_is_upright_and_in_order(tmp_path, name):
    frames = [quadrants()] * 6 + [quadrants()[::-1]] * 6  # upside-down in its second half
    iio.imwrite(tmp_path / name, np.stack(frames), plugin="pyav", codec="mpeg4", fps=10)
    save_frames(tmp_path / "z", [0])
    clip = Clips(str(tmp_path), "train", 32)[0]
    assert clip.shape == (12, 32, 32, 3) and clip.dtype == np.uint8
    assert_upright(clip[2])
    assert_upright(clip[10][::-1])


def test_video_is_turned_as_a_phone_was_held(tmp_path):
    """The file stores how: a matrix in the header of its track."""
    lying = quadrants().swapaxes(0, 1)[::-1]  # a quarter turn
    iio.imwrite(tmp_path / "a.mp4", np.stack([lying] * 4), plugin="pyav", codec="mpeg4", fps=10)
    save_frames(tmp_path / "z", [0])
    content = bytearray((tmp_path / "a.mp4").read_bytes())
    place = content.find(b"tkhd") + 44
    content[place : place + 36] = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 64 << 16, 0, 1 << 30)
    (tmp_path / "a.mp4").write_bytes(content)
    assert_upright(Clips(str(tmp_path), "train", 32)[0][1])


def test_gif_is_upright_and_in_order(tmp_path):
    pictures = [
        Image.fromarray(picture) for picture in (quadrants(), quadrants()[::-1], quadrants()[:, ::-1])
    ]
    pictures[0].save(tmp_path / "a.gif", save_all=True, append_images=pictures[1:], duration=100)
    save_frames(tmp_path / "z", [0])
    clip = Clips(str(tmp_path), "train", 32)[0]
    assert len(clip) == 3
    assert_upright(clip[0])
    assert_upright(clip[1][::-1])
    assert_upright(clip[2][:, ::-1])


def test_frame_folder_is_cropped_in_the_middle_and_upright(tmp_path):
    wide = np.zeros((60, 200, 3), np.uint8)
    wide[:, 70:130] = quadrants(60, 60)  # the centre square; what is outside is black
    (tmp_path / "a").mkdir()
    Image.fromarray(wide).save(tmp_path / "a" / "0.png")
    large = np.zeros((600, 2000, 3), np.uint8)  # so large that the JPEG is decoded at a fraction
    large[:, 700:1300] = quadrants(600, 600)
    Image.fromarray(large).save(tmp_path / "a" / "1.jpg", quality=95)
    save_frames(tmp_path / "z", [0])
    for frame in Clips(str(tmp_path), "train", 32)[0]:
        assert_upright(frame)
        assert frame[4:-4, 1].max(axis=-1).min() > 150, "black from outside the centre square"


def test_frames_are_in_the_order_of_their_numbers(tmp_path):
    save_frames(tmp_path / "a", [10, 20, 30], ["frame2.png", "frame10.png", "frame1.png"])
    save_frames(tmp_path / "z", [0])
    assert Clips(str(tmp_path), "train", 8)[0][:, 0, 0, 0].tolist() == [30, 10, 20]


def test_resize_is_antialiased(tmp_path):
    (tmp_path / "a").mkdir()
    stripes = np.zeros((256, 256, 3), np.uint8)
    stripes[:, ::2] = 200  # one-pixel stripes must become an even grey
    Image.fromarray(stripes).save(tmp_path / "a" / "0.png")
    save_frames(tmp_path / "z", [0])
    assert np.abs(Clips(str(tmp_path), "train", 32)[0][0].astype(int) - 100).max() < 12


def test_long_clip_is_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(video_clips, "MAX_CLIP_FRAMES", 3)
    save_frames(tmp_path / "a", [1, 2, 3, 4, 5])
    save_frames(tmp_path / "z", [0])
    assert Clips(str(tmp_path), "train", 8)[0][:, 0, 0, 0].tolist() == [1, 2, 3]


def test_memory_is_bounded_and_the_least_recently_used_clip_goes(tmp_path, monkeypatch):
    for k in range(6):
        save_frames(tmp_path / f"clip{k}", [k, k])
    monkeypatch.setattr(video_clips, "CACHE_BYTES", 2 * 2 * 8 * 8 * 3)  # two clips
    read = []
    original = video_clips.read_clip

    def counted(root: Path, name: str, pictures: list[str], size: int) -> np.ndarray:
        read.append(name)
        return original(root, name, pictures, size)

    monkeypatch.setattr(video_clips, "read_clip", counted)
    clips = Clips(str(tmp_path), "train", 8)
    for index in (0, 1, 0, 2, 0, 1):  # 2 drives out 1, not 0
        assert clips[index][0, 0, 0, 0] == index
    assert read == ["clip0", "clip1", "clip2", "clip1"]
    monkeypatch.setattr(video_clips, "CACHE_BYTES", 1)  # a clip larger than the bound still works
    assert clips[3][0, 0, 0, 0] == 3


def test_a_caller_cannot_change_the_cached_clip():
    with pytest.raises(ValueError, match="read-only"):
        Clips("generated", "train", 32)[0][0] = 0


# --- bad input ---


@pytest.mark.parametrize("name", ["broken.mp4", "broken.gif"])
def test_undecodable_video_is_named(tmp_path, name):
    (tmp_path / name).write_bytes(b"this is no video" * 100)
    save_frames(tmp_path / "z", [0])
    clips = Clips(str(tmp_path), "train", 16)
    with pytest.raises(SystemExit) as error:
        clips[0]
    assert str(tmp_path / name) in one_line(error) and "delete" in one_line(error)


def test_truncated_picture_is_named(tmp_path):
    save_frames(tmp_path / "a", [1, 2])
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(
        buffer, "png"
    )
    (tmp_path / "a" / "00001.png").write_bytes(buffer.getvalue()[:3000])
    save_frames(tmp_path / "z", [0])
    with pytest.raises(SystemExit) as error:
        Clips(str(tmp_path), "train", 16)[0]
    assert str(tmp_path / "a" / "00001.png") in one_line(error)


def test_empty_folder_says_what_is_accepted(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "loose.png")  # a picture without a folder of its own is no clip
    with pytest.raises(SystemExit) as error:
        Clips(str(tmp_path), "train", 16)
    assert all(
        ending in one_line(error) for ending in (str(tmp_path), ".mp4", ".avi", ".gif", ".jpg", ".png")
    )


@pytest.mark.parametrize("split", ["train", "test"])
def test_one_clip_cannot_be_split(tmp_path, split):
    save_frames(tmp_path / "only", [1, 2])
    with pytest.raises(SystemExit) as error:
        Clips(str(tmp_path), split, 16)
    assert "1 clip" in one_line(error) and "at least 2" in one_line(error)


@pytest.mark.parametrize("word, nearest", [("generatd", "generated"), ("Davis", "davis"), ("non", "none")])
def test_unknown_word_suggests_the_nearest(word, nearest, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as error:
        Clips(word, "train", 16)
    assert f"did you mean {nearest!r}" in one_line(error)


def test_missing_path_and_foreign_file_are_named(tmp_path):
    (tmp_path / "file.zip").write_text("no archive")
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("readme.txt", "no DAVIS")
    for path, words in (
        ("missing/clips", "existing path"),
        ("file.zip", "neither a folder"),
        ("other.zip", "not DAVIS"),
    ):
        with pytest.raises(SystemExit) as error:
            Clips(str(tmp_path / path), "train", 16)
        assert str(tmp_path / path) in one_line(error) and words in one_line(error)


# --- DAVIS ---


def davis_files() -> dict[str, bytes]:
    """A stand-in for the official archive: three clips, each of its own grey, and the lists of its split."""
    files = {"DAVIS/ImageSets/2017/train.txt": b"walking\nbear\n", "DAVIS/ImageSets/2017/val.txt": b"camel\n"}
    files["DAVIS/ImageSets/480p/train.txt"] = b"camel\n"  # the lists of other years lie beside them
    for name, grey in (("bear", 50), ("camel", 120), ("walking", 190)):
        for k in range(3):
            for folder, ending, level in (("JPEGImages", "jpg", grey + 10 * k), ("Annotations", "png", 255)):
                buffer = io.BytesIO()
                Image.new("RGB", (85, 48), (level,) * 3).save(buffer, "jpeg" if ending == "jpg" else "png")
                files[f"DAVIS/{folder}/480p/{name}/{k:05d}.{ending}"] = buffer.getvalue()
    return files


def davis_zip(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name in reversed(files):  # the order in an archive means nothing
            archive.writestr(name, files[name])
    return path


def test_clips_in_several_sizes_are_refused(tmp_path):
    """Else a clip would be one to train on in one size, and one to test on in another."""
    (tmp_path / "DAVIS/JPEGImages/480p").mkdir(parents=True)
    with pytest.raises(SystemExit) as error:
        Clips(str(tmp_path / "DAVIS/JPEGImages"), "test", 8)
    assert "give the folder above" in one_line(error)


@pytest.mark.parametrize("form", ["archive", "folder", "folder inside"])
def test_davis_has_its_official_split(tmp_path, form):
    path = davis_zip(tmp_path / "davis.zip", davis_files())
    if form != "archive":
        zipfile.ZipFile(path).extractall(tmp_path / "out")
        path = tmp_path / "out" / ("DAVIS" if form == "folder inside" else "")
    train, test = Clips(str(path), "train", 16), Clips(str(path), "test", 16)
    assert train.names == ["walking", "bear"] and test.names == ["camel"]
    for clips, index, grey in ((train, 0, 190), (train, 1, 50), (test, 0, 120)):
        assert clips[index].shape == (3, 16, 16, 3)
        assert np.abs(clips[index][:, 8, 8, 0].astype(int) - [grey, grey + 10, grey + 20]).max() <= 2


def test_incomplete_davis_is_refused(tmp_path):
    files = davis_files()
    without_bear = davis_zip(
        tmp_path / "a.zip", {name: data for name, data in files.items() if "bear/" not in name}
    )
    without_lists = davis_zip(
        tmp_path / "b.zip", {name: data for name, data in files.items() if "2017" not in name}
    )
    for path, words in ((without_bear, "'bear'"), (without_lists, "ImageSets/2017/train.txt")):
        with pytest.raises(SystemExit) as error:
            Clips(str(path), "train", 16)
        assert words in one_line(error) and str(path) in one_line(error)


def test_damaged_picture_in_the_archive_is_named(tmp_path):
    files = davis_files()
    files["DAVIS/JPEGImages/480p/bear/00001.jpg"] = b"no picture"
    clips = Clips(str(davis_zip(tmp_path / "davis.zip", files)), "train", 16)
    with pytest.raises(SystemExit) as error:
        clips[clips.names.index("bear")]
    assert "davis.zip" in one_line(error) and "bear/00001.jpg" in one_line(error)


def test_davis_without_a_network(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(video_clips, "DAVIS_URL", "http://127.0.0.1:1/DAVIS-2017-trainval-480p.zip")
    with pytest.raises(SystemExit) as error:
        Clips("davis", "train", 16)
    message = one_line(error)
    assert video_clips.DAVIS_URL in message and "refused" in message and "--videos PATH" in message
    assert not list(tmp_path.rglob("*.zip*"))


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Serves the stand-in archive. data: its bytes; cut: bytes after which it hangs up; asked: how often."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            httpd.asked += 1
            time.sleep(httpd.delay)
            self.send_response(200)
            self.send_header("Content-Length", str(len(httpd.data)))
            self.end_headers()
            self.wfile.write(httpd.data[: httpd.cut])

        def log_message(self, *args):
            pass

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.data = davis_zip(tmp_path / "source.zip", davis_files()).read_bytes()
    httpd.cut, httpd.delay, httpd.asked = None, 0, 0
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    url = f"http://127.0.0.1:{httpd.server_port}/DAVIS-2017-trainval-480p.zip"
    monkeypatch.setattr(video_clips, "DAVIS_URL", url)
    httpd.folder = tmp_path / "cache" / "lam_vlm"
    thread = threading.Thread(target=httpd.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield httpd
    httpd.shutdown()
    thread.join()
    httpd.server_close()


def test_davis_is_downloaded_once(server):
    assert Clips("davis", "train", 16).names == ["walking", "bear"]
    assert Clips("davis", "test", 16).names == ["camel"]
    assert server.asked == 1
    assert [path.name for path in server.folder.glob("[!.]*")] == ["DAVIS-2017-trainval-480p.zip"]


def test_two_downloads_at_once_share_one(server):
    server.delay = 0.3
    threads = [threading.Thread(target=video_clips.davis_archive) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert server.asked == 1
    assert (server.folder / "DAVIS-2017-trainval-480p.zip").read_bytes() == server.data


def test_a_download_that_was_cut_is_not_used(server):
    server.cut = 1000
    with pytest.raises(SystemExit) as error:
        Clips("davis", "train", 16)
    assert "cannot download" in one_line(error) and not list(server.folder.glob("*.zip"))
    server.cut = None
    assert len(Clips("davis", "train", 16)[0]) == 3


def test_a_download_that_was_killed_before_its_check_is_checked(server):
    server.folder.mkdir(parents=True)
    unchecked = server.folder / "DAVIS-2017-trainval-480p.zip.unchecked"
    unchecked.write_bytes(server.data)
    assert len(Clips("davis", "test", 16)) == 1
    assert server.asked == 0 and not unchecked.exists()


def test_damaged_download_is_deleted_and_never_used(server):
    whole = server.data
    middle = whole.index(b"JFIF") + 40  # inside a picture: the archive's list of contents stays readable
    server.data = whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1 :]
    with pytest.raises(SystemExit) as error:
        Clips("davis", "train", 16)
    assert "deleted" in one_line(error) and not list(server.folder.glob("[!.]*"))
    server.data = whole
    assert len(Clips("davis", "train", 16)) == 2
