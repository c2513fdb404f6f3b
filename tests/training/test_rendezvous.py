"""All come, or all hear in a sentence who did not."""

import contextlib
import re
import socket
import threading
import time

import program
import pytest

from moejax.training import rendezvous


@pytest.fixture(autouse=True)
def _often(monkeypatch):
  monkeypatch.setattr(rendezvous, "PATIENCE", 60.0)
  monkeypatch.setattr(rendezvous, "WORD", 0.05)
  monkeypatch.setattr(rendezvous, "_SIGN", 0.02)


@pytest.fixture
def give_up(monkeypatch):
  """give_up(text, *processes): they give up, once they have said a text."""

  def give_up(text, *processes):
    while not all(text in process.said for process in processes):
      time.sleep(0.01)
    monkeypatch.setattr(rendezvous, "PATIENCE", 0.0)

  return give_up


class Process(threading.Thread):
  """One that comes; `error` is what it ends with, `said` what it says."""

  def __init__(self, address, number, count):
    super().__init__()
    self.error, self.said = "", []
    self._about = address, number, count
    self.start()

  def run(self):
    try:
      rendezvous.meet(*self._about, self.said.append)
    except Exception as error:  # A test compares it with nothing.
      self.error = str(error)


def end(*processes):
  for process in processes:
    process.join(program.PATIENCE)
    assert not process.is_alive()
  return [process.error for process in processes]


def visit(address):
  """Connects to process 0, as soon as it listens."""
  host, _, port = address.rpartition(":")
  while True:
    with contextlib.suppress(ConnectionRefusedError):
      return socket.create_connection((host, int(port)))


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
def test_all_meet_whoever_comes_first(order):
  address = program.free_address()
  assert end(*(Process(address, number, 3) for number in order)) == [""] * 3


def test_who_does_not_come_is_named_to_all(give_up):
  address = program.free_address()
  processes = [Process(address, number, 4) for number in (0, 2)]
  give_up(f"waiting for processes 1, 3 of 4 at {address}", *processes)
  for error in end(*processes):
    assert "did not meet: processes 1, 3 of 4 did not come to local" in error
    assert re.search(r"start all of them within 0 seconds, .*--process", error)


def test_a_first_process_that_does_not_come_is_named(give_up):
  address = program.free_address()
  process = Process(address, 1, 2)
  why = f"process 0 does not answer at {address} (Connection refused)"
  give_up(why, process)
  assert f"did not meet: {why}; start all" in end(process)[0]


def test_a_second_one_of_an_id_is_refused():
  """The others go on waiting for the one that it should be."""
  address = program.free_address()
  first, one, other = (Process(address, number, 3) for number in (0, 1, 1))
  while first.is_alive() and one.is_alive() and other.is_alive():
    one.join(0.01)
  refused, stays = (one, other) if one.error else (other, one)
  message = "two processes were started with --process_id=1, on "
  assert message in refused.error
  assert any(message in said for said in first.said)
  last = Process(address, 2, 3)
  assert end(first, stays, last) == [""] * 3


def test_one_that_expects_others_is_refused(give_up):
  address = program.free_address()
  first, other = Process(address, 0, 2), Process(address, 1, 3)
  (error,) = end(other)
  assert "was started with --num_processes=3, but process 0 with 2" in error
  give_up(f"waiting for process 1 of 2 at {address}", first)
  assert "process 1 of 2 did not come" in end(first)[0]


def test_one_that_left_may_come_again():
  address = program.free_address()
  first = Process(address, 0, 3)
  with visit(address) as left:
    left.sendall(b'{"process": 1, "of": 3, "host": "there"}\n')
    said = b""
    while b"missing" not in said:
      said += left.recv(1000)
  again = Process(address, 1, 3)
  while again.is_alive() and not again.said:
    again.join(0.01)
    if again.error:
      again = Process(address, 1, 3)
  last = Process(address, 2, 3)
  assert end(first, again, last) == [""] * 3


@pytest.mark.parametrize("content", [b"SSH-2.0\r\n", b"\0\0\x12\4", b"[]\n"])
def test_another_program_at_the_address_is_told(monkeypatch, content):
  monkeypatch.setattr(rendezvous, "_SILENCE", 0.5)
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


def test_what_is_no_message_disturbs_nobody():
  address = program.free_address()
  first = Process(address, 0, 2)
  for content in (
    b"GET / HTTP/1.1\r\n",
    b"[]\n",
    b'{"process": {}, "of": 2, "host": "x"}\n',
    b'{"process": 1, "of": 2}\n',
    b"\xff\n",
  ):
    with visit(address) as guest:
      guest.sendall(content)
      with contextlib.suppress(ConnectionResetError):
        while guest.recv(1000):
          pass
  assert end(first, Process(address, 1, 2)) == ["", ""]
