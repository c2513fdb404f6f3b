"""All come, or all hear in a sentence who did not."""

import re
import socket
import threading

import program
import pytest

from moejax.training import meeting


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
  monkeypatch.setattr(meeting, "PATIENCE", 1.0)
  monkeypatch.setattr(meeting, "WORD", 0.1)
  monkeypatch.setattr(meeting, "_SIGN", 0.02)
  monkeypatch.setattr(meeting, "_SILENCE", 0.5)


class Process(threading.Thread):
  """One that comes; `error` is what it ends with, `said` what it says."""

  def __init__(self, address, number, count):
    super().__init__()
    self.error, self.said = "", []
    self._about = address, number, count
    self.start()

  def run(self):
    try:
      meeting.meet(*self._about, self.said.append)
    except Exception as error:  # A test compares it with nothing.
      self.error = str(error)


def end(*processes):
  for process in processes:
    process.join(program.PATIENCE)
    assert not process.is_alive()
  return [process.error for process in processes]


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
def test_all_meet_whoever_comes_first(order):
  address = program.free_address()
  assert end(*(Process(address, number, 3) for number in order)) == [""] * 3


def test_who_does_not_come_is_named_to_all():
  address = program.free_address()
  processes = [Process(address, number, 4) for number in (0, 2)]
  for error in end(*processes):
    assert "did not meet: processes 1, 3 of 4 did not come to local" in error
    assert re.search(r"start all of them within 1 seconds, .*--process", error)
  for process in processes:
    assert f"waiting for processes 1, 3 of 4 at {address}" in process.said


def test_a_first_process_that_does_not_come_is_named():
  address = program.free_address()
  process = Process(address, 1, 2)
  (error,) = end(process)
  why = f"process 0 does not answer at {address} (Connection refused)"
  assert f"did not meet: {why}; start all" in error
  assert why in process.said


def test_a_second_one_of_an_id_is_sent_away(monkeypatch):
  """The others go on waiting for the one that it should be."""
  monkeypatch.setattr(meeting, "PATIENCE", 60.0)
  address = program.free_address()
  first, one, other = (Process(address, number, 3) for number in (0, 1, 1))
  while first.is_alive() and one.is_alive() and other.is_alive():
    one.join(0.01)
  sent_away, stays = (one, other) if one.error else (other, one)
  message = "two processes were started with --process_id=1, on "
  assert message in sent_away.error
  assert any(message in said for said in first.said)
  last = Process(address, 2, 3)
  assert end(first, stays, last) == [""] * 3


def test_one_that_expects_others_is_sent_away():
  address = program.free_address()
  first, other = Process(address, 0, 2), Process(address, 1, 3)
  error, refused = end(first, other)
  assert "was started with --num_processes=3, but process 0 with 2" in refused
  assert "process 1 of 2 did not come" in error


def test_one_that_left_may_come_again(monkeypatch):
  monkeypatch.setattr(meeting, "PATIENCE", 60.0)
  address = program.free_address()
  first = Process(address, 0, 3)
  host, _, port = address.rpartition(":")
  while True:
    try:
      left = socket.create_connection((host, int(port)))
      break
    except ConnectionRefusedError:
      pass
  left.sendall(b'{"process": 1, "of": 3, "host": "there"}\n')
  # The greeting, and whom it waits for.
  assert b"missing" in b"".join(left.recv(1000) for _ in range(2))
  left.close()
  again = Process(address, 1, 3)
  while again.is_alive() and not again.said:
    again.join(0.01)
    if again.error:
      again = Process(address, 1, 3)
  last = Process(address, 2, 3)
  assert end(first, again, last) == [""] * 3


@pytest.mark.parametrize(
  "content", [b"SSH-2.0\r\n", b"", b"\0\0\x12\4", b"[]\n"]
)
def test_another_program_at_the_address_is_told(content):
  with socket.create_server(("localhost", 0)) as server:

    def answer():
      guest, _ = server.accept()
      with guest:
        guest.sendall(content)
        guest.recv(1)

    thread = threading.Thread(target=answer, daemon=True)
    thread.start()
    address = f"localhost:{server.getsockname()[1]}"
    (error,) = end(Process(address, 1, 2))
    thread.join()
  assert f"what answers at --coordinator_address={address} does not" in error
  assert "it is another program, or a run that has begun" in error


def test_a_port_that_is_taken_is_told():
  with socket.create_server(("", 0)) as server:
    port = server.getsockname()[1]
    (error,) = end(Process(f"localhost:{port}", 0, 2))
  assert f"process 0 cannot listen on port {port}" in error
  assert "(Address already in use)" in error


def test_what_is_no_message_disturbs_nobody(monkeypatch):
  monkeypatch.setattr(meeting, "PATIENCE", 60.0)
  address = program.free_address()
  first = Process(address, 0, 2)
  host, _, port = address.rpartition(":")
  contents = [
    b"GET / HTTP/1.1\r\n",
    b"[]\n",
    b'{"process": {}, "of": 2, "host": "x"}\n',
    b'{"process": 1, "of": 2}\n',
    b"\xff\n",
  ]
  for content in contents:
    while True:
      try:
        guest = socket.create_connection((host, int(port)))
        break
      except ConnectionRefusedError:
        pass
    with guest:
      guest.sendall(content)
      while guest.recv(1000):
        pass
  assert end(first, Process(address, 1, 2)) == ["", ""]
