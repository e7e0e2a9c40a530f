"""Kills, full disks and damage: a reduced `validation.crash`, and what it does not reach."""

from __future__ import annotations

import errno
import os
import threading
import warnings
from typing import Any

import h5py
import numpy as np
import pytest
import torch

import hyperlearn as hl
from hyperlearn.runs import RunFile, columns
from hyperlearn.runs import sink as sinks
from tests.hyperlearn.runs.test_resume import METHODS, problem
from validation import crash


@pytest.mark.parametrize(
    ("study", "name"),
    [
        (lambda: crash.kills(6, seed=1, steps=300), "killed while writing"),
        (lambda: crash.full_disks(6, seed=2, steps=300), "ended by another write"),
        (lambda: crash.damaged(10, "truncated", seed=3, steps=600), "recovered in part"),
        (lambda: crash.damaged(10, "flipped", seed=4, steps=600), "recovered in part"),
    ],
    ids=["kills", "full disks", "truncated", "flipped"],
)
def test_nothing_is_lost_or_read_wrong(study, name):
    outcome = study()
    assert outcome.faults == []
    assert outcome.counts[name] > 0, "the study has not met what it is about"
    assert outcome.counts["records lost"] == 0


def test_the_study_finds_a_loss(tmp_path):
    path = tmp_path / "run.h5"
    crash.write(path, 40, lambda step: None)
    outcome = crash.Outcome("a test")
    crash.check_whole(path, 41, outcome, "here")
    assert outcome.faults == ["here: 41 records were reported, 40 are there"]


def test_the_study_finds_a_wrong_value(tmp_path, monkeypatch):
    path = tmp_path / "run.h5"
    crash.write(path, 40, lambda step: None)
    monkeypatch.setattr(crash, "value_at", lambda step: 0.0)
    outcome = crash.Outcome("a test")
    crash.check_whole(path, 40, outcome, "here")
    assert len(outcome.faults) == 1


class TestFullDisk:
    @pytest.fixture
    def full(self, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
        """Writes of whole files fail while ``on``."""
        state: dict[str, Any] = {"on": False}
        real = os.pwrite

        def pwrite(descriptor: int, data: Any, offset: int) -> int:
            if state["on"] and len(data) > 2000:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(descriptor, data, offset)

        monkeypatch.setattr(sinks.os, "pwrite", pwrite)
        return state

    def test_a_checkpoint_that_cannot_be_written_does_not_end_the_run(self, tmp_path, full):
        path = tmp_path / "run.h5"

        def fill(row: Any) -> None:
            full["on"] = 3 <= row["step"] < 9

        with pytest.warns(RuntimeWarning, match="no checkpoint at step 3: .*No space left"):
            run = hl.minimize(
                problem(), METHODS["cg"], budget=hl.Budget(steps=12), record=path, every=1,
                checkpoints=hl.Checkpoints(steps=3), callbacks=[fill],
            )  # fmt: skip
        assert run.status == "finished"
        assert hl.load_run(path).history["step"][-1] == 12

    def test_a_result_that_cannot_be_written_is_told_and_kept(self, tmp_path, full):
        path = tmp_path / "run.h5"

        def fill(row: Any) -> None:
            full["on"] = row["step"] == 6

        with pytest.raises(hl.RecordError, match="the result could not be written") as caught:
            hl.minimize(
                problem(), METHODS["cg"], budget=hl.Budget(steps=6), record=path, every=1,
                callbacks=[fill],
            )  # fmt: skip
        run = caught.value.run
        assert run.status == "finished"
        assert run.x is not None
        np.testing.assert_array_equal(run.history["step"], np.arange(7))
        stored = hl.load_run(path)
        assert stored.status == "killed"
        np.testing.assert_array_equal(stored.history["outer_loss"], run.history["outer_loss"])
        full["on"] = False
        assert hl.resume(path, problem()).status == "finished"

    def test_a_record_without_room_is_told_and_the_run_is_handed_over(
        self, tmp_path, full, monkeypatch
    ):
        monkeypatch.setattr(columns, "CHUNK", 4)
        path = tmp_path / "run.h5"

        def fill(row: Any) -> None:
            full["on"] = row["step"] >= 2

        with pytest.raises(hl.RecordError, match="free some space, then resume") as caught:
            hl.minimize(
                problem(), METHODS["cg"], budget=hl.Budget(steps=50), record=path, every=1,
                callbacks=[fill],
            )  # fmt: skip
        run = caught.value.run
        reported = len(run.history["step"]) - 1  # the last was not
        assert run.status == "failed"
        full["on"] = False
        assert len(hl.load_run(path).history["step"]) == reported >= 3
        whole = hl.minimize(problem(), METHODS["cg"], budget=hl.Budget(steps=50), every=1)
        resumed = hl.resume(path, problem())
        np.testing.assert_array_equal(resumed.history["outer_loss"], whole.history["outer_loss"])

    def test_a_file_that_cannot_be_begun(self, tmp_path, full):
        full["on"] = True
        with pytest.raises(OSError, match="No space left"):
            RunFile(tmp_path / "run.h5", config={}, environment={})
        assert list(tmp_path.iterdir()) == []

    def test_large_files_that_hdf5_writes_itself(self, tmp_path, full, monkeypatch):
        monkeypatch.setattr("hyperlearn.runs.writer.IN_MEMORY", 0)
        path = tmp_path / "run.h5"
        with RunFile(path, config={}, environment={}) as file:
            file.append({"step": 0})
            before = path.read_bytes()
            full["on"] = True
            for _ in range(3):
                with pytest.raises(OSError, match="No space left"):
                    file.checkpoint(1, {"x": torch.rand(300_000)})
            assert path.read_bytes() == before
            full["on"] = False
            file.checkpoint(1, {"x": torch.ones(300_000)})
        assert hl.load_run(path).checkpoints == (1,)


class TestTwoWriters:
    def test_are_refused(self, tmp_path):
        path = tmp_path / "run.h5"
        settings: dict[str, Any] = {"config": {}, "environment": {}}
        with RunFile(path, **settings) as file:
            for changes in ({"overwrite": True},):
                with pytest.raises(hl.RunInUseError, match=f"another run .process {os.getpid()}"):
                    RunFile(path, **settings, **changes)
            file.append({"step": 0})
        assert not path.with_name("run.h5.lock").exists()
        RunFile(path, **settings, overwrite=True).close()

    def test_by_minimize(self, tmp_path):
        path = tmp_path / "run.h5"
        refused = []

        def again(row: Any) -> None:
            with pytest.raises(hl.RunInUseError) as caught:
                hl.minimize(
                    problem(), METHODS["cg"], budget=hl.Budget(steps=3), record=path, resume=True
                )
            refused.append(caught.value)

        run = hl.minimize(
            problem(), METHODS["cg"], budget=hl.Budget(steps=3), record=path, callbacks=[again]
        )
        assert len(refused) == 2
        assert run.status == "finished"
        np.testing.assert_array_equal(hl.load_run(path).history["step"], [0, 3])

    def test_a_lock_that_a_killed_process_left_is_none(self, tmp_path):
        (tmp_path / "run.h5.lock").write_text("12345\n")
        RunFile(tmp_path / "run.h5", config={}, environment={}).close()
        assert [p.name for p in tmp_path.iterdir()] == ["run.h5"]

    def test_status_says_whether_it_is_being_written(self, tmp_path):
        path = tmp_path / "run.h5"
        with RunFile(path, config={}, environment={}):
            assert hl.load_run(path).status == "running"
        assert hl.load_run(path).status == "killed"


class TestDamage:
    def test_of_a_sealed_column_is_found_when_it_is_read(self, tmp_path):
        """The others can still be read."""
        path = tmp_path / "run.h5"
        rng = np.random.default_rng(0)
        with RunFile(path, config={}, environment={}) as file:
            for step in range(1500):
                file.append({"step": step, "loss": rng.normal()})
            file.finish("finished", "", {})
        with h5py.File(path) as opened:
            place = opened["history/loss"].id.get_chunk_info_by_coord((512,))
        with path.open("r+b") as raw:
            raw.seek(place.byte_offset + 99)
            raw.write(b"\xff\x00\xff")
        run = hl.load_run(path)
        np.testing.assert_array_equal(run.history["step"], np.arange(1500))
        with pytest.raises(hl.DamagedError, match="/history/loss is damaged"):
            run.history["loss"]
        saved = hl.recover(path, tmp_path / "saved.h5")
        assert saved.status == "recovered"
        found = hl.load_run(tmp_path / "saved.h5")
        np.testing.assert_array_equal(found.history["step"], np.arange(512))
        np.testing.assert_array_equal(
            found.history["loss"], np.random.default_rng(0).normal(size=1500)[:512]
        )
        with pytest.raises(FileExistsError):
            hl.recover(path, tmp_path / "saved.h5")

    def test_nothing_to_recover(self, tmp_path):
        path = tmp_path / "run.h5"
        path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100))
        with pytest.raises(hl.DamagedError) as caught:
            hl.load_run(path)
        assert caught.value.recovered is None
        with pytest.raises(hl.RunFileError, match="nothing of a run can be read"):
            hl.recover(path, tmp_path / "saved.h5")


def test_a_reader_that_follows(tmp_path):
    """Each look is a whole run, whatever is being written meanwhile."""
    path, lengths = tmp_path / "run.h5", []

    def look(row: Any) -> None:
        run = hl.load_run(path)
        assert run.history["step"][-1] == row["step"]
        lengths.append(len(run.history["step"]))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hl.minimize(
            problem(), METHODS["cg"], budget=hl.Budget(steps=30), record=path, every=1,
            checkpoints=hl.Checkpoints(steps=4), callbacks=[look],
        )  # fmt: skip
    assert lengths == list(range(1, 32))


def test_a_run_loaded_before_reads_what_it_saw(tmp_path):
    """Not what was recorded later; and not another run that took the name."""
    path = tmp_path / "run.h5"
    with RunFile(path, config={}, environment={}) as file:
        file.append({"step": 0, "loss": 1.0})
        early = hl.load_run(path)
        for step in range(1, 2000):
            file.append({"step": step, "loss": 2.0})
        np.testing.assert_array_equal(early.history["loss"], [1.0])
    early = hl.load_run(path)
    RunFile(path, config={}, environment={}, overwrite=True).close()
    with pytest.raises(hl.RunFileError, match="another run by now"):
        early.history["loss"]


def test_what_a_cut_file_has_lost_is_not_recovered_as_zeros(tmp_path):
    path, found = tmp_path / "run.h5", set()
    with RunFile(path, config={}, environment={}) as file:
        file.append({"step": 0})
        file.checkpoint(1, {"x": torch.full((50_000,), 3.0)})
        file.finish("finished", "", {"x": torch.full((50_000,), 3.0), "z": torch.ones(50_000)})
    whole = path.read_bytes()
    for share in np.linspace(0.05, 0.99, 40):
        path.write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(hl.RunFileError) as caught:
            hl.load_run(path)
        recovered = caught.value.recovered
        x = None if recovered is None else recovered.x
        assert x is None or bool((x == 3).all())
        found.add(x is not None)
    assert found == {True, False}


def test_blocks_of_zeros_are_found(tmp_path):
    """As a file system may leave them: HDF5's own checksum of zeros is zero."""
    path = tmp_path / "run.h5"
    with RunFile(path, config={}, environment={}) as file:
        file.finish("finished", "", {"x": torch.full((500_000,), 3.0)})
    with h5py.File(path) as opened:
        place = opened["result/x"].id.get_offset()
    with path.open("r+b") as raw:
        raw.seek(place + 4096)
        raw.write(bytes(4096))
    with pytest.raises(hl.DamagedError, match="/result/x is damaged"):
        hl.load_run(path).result["x"]


def test_recover_keeps_certificates_and_checkpoints(tmp_path):
    path = tmp_path / "run.h5"
    hl.minimize(
        problem(), METHODS["nhgd, kept"], budget=hl.Budget(steps=9), every=2, record=path,
        checkpoints=hl.Checkpoints(steps=4, keep=9),
    )  # fmt: skip
    before = hl.load_run(path)
    saved = hl.recover(path, tmp_path / "saved.h5")
    assert saved.checkpoints == before.checkpoints == (0, 4, 8, 9)
    assert saved.certificate == before.certificate
    for name, column in before.certificates.items():
        np.testing.assert_array_equal(saved.certificates[name], column)
    run = hl.resume(tmp_path / "saved.h5", problem(), budget=hl.Budget(steps=15))
    whole = hl.minimize(problem(), METHODS["nhgd, kept"], budget=hl.Budget(steps=15), every=2)
    np.testing.assert_array_equal(run.history["outer_loss"], whole.history["outer_loss"])


def test_readers_in_other_threads_and_processes_hands(tmp_path):
    """While records come fast, in one process; and while a user holds the file open with h5py."""
    path, errors, looks = tmp_path / "run.h5", [], []
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            try:
                looks.append(len(hl.load_run(path).history.get("step", ())))
            except Exception as error:
                errors.append(error)

    with RunFile(path, config={}, environment={}) as file:
        readers = [threading.Thread(target=read) for _ in range(3)]
        for reader in readers:
            reader.start()
        for step in range(6000):
            file.append({"step": step, "text": "a" * (step // 100)})
            if step % 500 == 0:
                file.checkpoint(step, {"x": torch.ones(1000)})
        done.set()
        for reader in readers:
            reader.join()
        assert errors == []
        assert looks
        with h5py.File(path):
            assert len(hl.load_run(path).history["step"]) == 6000


def test_ctrl_c_at_a_record_loses_no_step(tmp_path):
    path = tmp_path / "run.h5"

    def press(row: Any) -> None:
        if row["step"] == 6:
            raise KeyboardInterrupt

    settings: dict[str, Any] = {"budget": hl.Budget(steps=14), "every": 3}
    run = hl.minimize(problem(), METHODS["nhgd"], record=path, callbacks=[press], **settings)
    assert run.status == "interrupted"
    assert hl.load_run(path).checkpoints[-1] == 6
    whole = hl.minimize(problem(), METHODS["nhgd"], **settings)
    resumed = hl.resume(path, problem())
    np.testing.assert_array_equal(resumed.history["step"], whole.history["step"])
    np.testing.assert_array_equal(resumed.history["outer_loss"], whole.history["outer_loss"])
