"""Stopping stops: after a time limit or a kill nothing of a command is alive, whatever it did to get away."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
from e2e_support import Transcript, as_root, assert_stands_still, commands, needs_program, still_works

from agentos import VM, Limits

RUNAWAY = """
import os, sys, time
def beat(name):
    with open(f"/tmp/{name}", "ab", buffering=0) as file:
        while True:
            file.write(b".")
            time.sleep(0.01)
def become(name, new_session):
    if os.fork():
        return
    if new_session:
        os.setsid()
    if os.fork():
        os._exit(0)
    if new_session:
        os.setsid()
    os.closerange(0, 1000)
    os.environ.clear()
    os.chdir("/")
    beat(name)
become("daemon", True)
become("double", False)
if os.fork() == 0:
    os.setpgid(0, 0)
    beat("group")
paths = ["/tmp/daemon", "/tmp/double", "/tmp/group"]
while not all(os.path.exists(path) and os.path.getsize(path) for path in paths):
    time.sleep(0.001)
print("ready", flush=True)
time.sleep(1000)
"""
"""Descendants in sessions and groups of their own, without descriptors or environment, each with a heartbeat."""

HEARTBEATS = ("/tmp/daemon", "/tmp/double", "/tmp/group")

FORK_BOMB = """
import os, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("bomb", flush=True)
while True:
    try:
        if os.fork() == 0:
            os.setsid()
    except OSError:
        pass
"""

STUBBORN = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("ready", flush=True)
while True:
    time.sleep(1000)
"""


def test_a_timeout_leaves_no_descendant(in_vm: Any) -> None:
    """Daemons, double forks and other groups are dead when a timed-out exec returns, with its output so far."""

    async def body(vm: VM) -> None:
        result = await vm.exec_file("python3", ["-c", RUNAWAY], timeout=2)
        assert (result.reason, result.stdout, result.exit_code) == ("timeout", "ready\n", 137)
        assert await commands(vm) == []
        for path in HEARTBEATS:
            await assert_stands_still(vm, path)
        await still_works(vm)

    in_vm(body)


def test_setsid_and_disown_do_not_escape_a_timeout(in_vm: Any) -> None:
    """`setsid sleep 1000 & disown` is dead after the timeout of its exec."""

    async def body(vm: VM) -> None:
        result = await vm.exec("setsid sleep 1000 & disown; nohup sleep 1001 & sleep 1002", timeout=0.5)
        assert result.reason == "timeout"
        assert await commands(vm) == []

    in_vm(body)


def test_a_kill_leaves_no_descendant(in_vm: Any) -> None:
    """When kill_process has returned, every descendant of a spawned process is dead."""

    async def body(vm: VM) -> None:
        process = await vm.spawn("python3", ["-c", RUNAWAY])
        await Transcript(process).until(b"ready\n")
        await vm.kill_process(process.pid)
        assert await commands(vm) == []
        for path in HEARTBEATS:
            await assert_stands_still(vm, path)
        assert await process.wait() == 137
        assert (await vm.get_process(process.pid)).reason == "signaled"

    in_vm(body)


def test_a_kill_spares_the_others(in_vm: Any) -> None:
    """Killing one process leaves another one and its children alive."""

    async def body(vm: VM) -> None:
        other = await vm.spawn("sh", ["-c", "sleep 2000 & echo up; wait"])
        await Transcript(other).until(b"up\n")
        process = await vm.spawn("sh", ["-c", "setsid sleep 1000 & echo up; wait"])
        await Transcript(process).until(b"up\n")
        await process.kill()
        assert sorted(await commands(vm)) == ["sh -c sleep 2000 & echo up; wait", "sleep 2000"]
        await other.kill()

    in_vm(body)


def test_a_fork_bomb_dies_of_a_timeout(in_vm: Any) -> None:
    """A bomb that fills the limit of processes with new sessions is gone with the timeout, and the VM works on."""

    async def body(vm: VM) -> None:
        result = await vm.exec_file("python3", ["-c", FORK_BOMB], timeout=1)
        assert (result.reason, result.stdout[:5]) == ("timeout", "bomb\n")
        assert await commands(vm) == []
        await still_works(vm)

    in_vm(body, limits=Limits(processes=64))


def test_a_fork_bomb_dies_of_a_kill(in_vm: Any) -> None:
    """The same for a bomb in bash that was spawned and is killed, ten times in one VM."""

    async def body(vm: VM) -> None:
        for _ in range(10):
            process = await vm.spawn("bash", ["-c", "b() { b | b & }; echo go; b; sleep 1000"])
            await Transcript(process).until(b"go\n")
            await process.kill()
            assert await commands(vm) == []
            assert await process.wait() == 137
        await still_works(vm)

    in_vm(body, limits=Limits(processes=64))


def test_the_wall_clock_limit(in_vm: Any) -> None:
    """timeout ends a silent command in its time; one that is done in time is not touched."""

    async def body(vm: VM) -> None:
        began = time.monotonic()
        result = await vm.exec("echo partial; echo bad >&2; sleep 1000", timeout=0.3)
        assert 0.3 <= time.monotonic() - began < 5
        assert (result.stdout, result.stderr) == ("partial\n", "bad\n")
        assert (result.reason, result.signal, result.exit_code) == ("timeout", "SIGKILL", 137)
        result = await vm.exec("echo done", timeout=30)
        assert (result.reason, result.exit_code) == ("exited", 0)

    in_vm(body)


def test_a_timeout_of_zero_is_over_at_once(in_vm: Any) -> None:
    """A limit of 0 seconds is a limit, not none."""

    async def body(vm: VM) -> None:
        assert (await vm.exec("sleep 1000", timeout=0)).reason == "timeout"
        assert await commands(vm) == []

    in_vm(body)


def test_the_limit_on_silence(in_vm: Any) -> None:
    """idle_timeout ends who says nothing, and spares who says something now and then, on either stream."""

    async def body(vm: VM) -> None:
        began = time.monotonic()
        result = await vm.exec("echo one; sleep 1000", idle_timeout=0.4)
        assert 0.4 <= time.monotonic() - began < 5
        assert (result.reason, result.stdout) == ("idleTimeout", "one\n")
        talks = "for i in 1 2 3 4 5 6; do sleep 0.3; echo $i >&$((i % 2 + 1)); done"
        result = await vm.exec(talks, idle_timeout=1.5)
        assert (result.reason, result.stdout, result.stderr) == ("exited", "2\n4\n6\n", "1\n3\n5\n")

    in_vm(body)


def test_the_limit_on_cpu_time(in_vm: Any) -> None:
    """cpu_timeout ends who computes, children included, and spares who sleeps for longer than that."""

    async def body(vm: VM) -> None:
        spin = "echo busy; (while :; do :; done) & (while :; do :; done) & wait"
        result = await vm.exec(spin, cpu_timeout=0.4, timeout=30)
        assert (result.reason, result.stdout) == ("cpuTimeout", "busy\n")
        assert await commands(vm) == []
        result = await vm.exec("sleep 0.8; echo slept", cpu_timeout=0.4)
        assert (result.reason, result.stdout) == ("exited", "slept\n")

    in_vm(body)


def test_cpu_time_of_children_that_came_and_went_counts(in_vm: Any) -> None:
    """A chain of short commands, none of them over the limit, is ended by the sum."""

    async def body(vm: VM) -> None:
        chain = "while :; do timeout 0.1 sh -c 'while :; do :; done'; done"
        result = await vm.exec(chain, cpu_timeout=0.5, timeout=30)
        assert result.reason == "cpuTimeout"

    in_vm(body)


def test_a_spawned_process_has_a_time_limit_too(in_vm: Any) -> None:
    """After timeout seconds the process and what it left are dead, and its reason says so."""

    async def body(vm: VM) -> None:
        process = await vm.spawn("sh", ["-c", "setsid sleep 1000 & echo here; sleep 1001"], timeout=0.4)
        status = await process.wait_status()
        assert (status.exit_code, status.reason) == (137, "timeout")
        assert (await process.read_output()).events[0].data == b"here\n"
        assert await commands(vm) == []

    in_vm(body)


def test_stop_asks_and_kill_after_insists(in_vm: Any) -> None:
    """SIGTERM lets a program end by itself; one that ignores it is killed after the grace, not before."""

    async def body(vm: VM) -> None:
        polite = await vm.spawn(
            "bash", ["-c", "trap 'echo bye; exit 7' TERM; echo ready; while :; do sleep 0.02; done"]
        )
        await Transcript(polite).until(b"ready\n")
        await vm.stop_process(polite.pid)
        assert await polite.wait() == 7
        assert b"bye\n" in await Transcript(polite).to_end()

        stubborn = await vm.spawn("python3", ["-c", STUBBORN])
        await Transcript(stubborn).until(b"ready\n")
        await vm.stop_process(stubborn.pid)
        with pytest.raises(TimeoutError):
            await stubborn.wait(0.2)
        began = time.monotonic()
        await vm.stop_process(stubborn.pid, kill_after=0.3)
        assert 0.3 <= time.monotonic() - began < 5
        status = await stubborn.wait_status()
        assert (status.exit_code, status.signal) == (137, "SIGKILL")

    in_vm(body)


def test_stop_reaches_the_whole_group(in_vm: Any) -> None:
    """SIGTERM goes to what a shell script started, not only to the shell that waits for it."""

    async def body(vm: VM) -> None:
        process = await vm.spawn("sh", ["-c", "sleep 1000 | sleep 1001 & echo up; wait"])
        await Transcript(process).until(b"up\n")
        await process.stop()
        assert await process.wait() == 143
        while await commands(vm):
            pass  # each of them has the signal, and ends as soon as it gets a CPU

    in_vm(body)


def test_stop_kill_and_signal_of_an_exited_process_do_nothing(in_vm: Any) -> None:
    """They are no error for one that has exited, and reach nobody who got its pid since."""

    async def body(vm: VM) -> None:
        process = await vm.spawn("true")
        await process.wait()
        await process.stop()
        await process.stop(kill_after=0)
        await process.kill()
        await process.signal("SIGINT")
        await still_works(vm)

    in_vm(body)


def test_signals_reach_the_program(in_vm: Any) -> None:
    """SIGINT is a KeyboardInterrupt to python; numbers, names and names without SIG are the same."""

    async def body(vm: VM) -> None:
        for signal in ("SIGINT", "INT", 2):
            script = "import time; print('ready', flush=True); time.sleep(1000)"
            process = await vm.spawn("python3", ["-c", script])
            transcript = Transcript(process)
            await transcript.until(b"ready\n")
            await vm.signal_process(process.pid, signal)
            assert await process.wait() in (130, 1)
            await transcript.until(b"KeyboardInterrupt")

    in_vm(body)


def test_stopping_and_continuing(in_vm: Any) -> None:
    """SIGSTOP halts a process, SIGCONT lets it go on, and the table shows the state; a stopped one can be killed."""

    async def body(vm: VM) -> None:
        script = "import time\nwhile True: print('x', flush=True); time.sleep(0.01)"
        process = await vm.spawn("python3", ["-c", script])
        await Transcript(process).until(b"x\n")
        await process.signal("SIGSTOP")
        while {one.pid: one.state for one in await vm.all_processes()}[process.pid] != "T":
            pass  # it has the signal, and stops as soon as it gets a CPU
        await process.signal("SIGCONT")
        end = Transcript(process, cursor=process.log.end)
        await end.until(b"x\nx\n")
        await process.signal("SIGSTOP")
        await process.kill()
        assert await process.wait() == 137

    in_vm(body)


@as_root
def test_an_out_of_memory_kill_is_told_apart(in_vm: Any) -> None:
    """What the kernel killed for its memory has reason oom; a kill -9 in the same VM has not."""

    async def body(vm: VM) -> None:
        eat = "x = []\nwhile True: x.append(bytearray(b'x' * 1048576))"
        result = await vm.exec_file("python3", ["-c", eat])
        assert (result.reason, result.exit_code, result.signal) == ("oom", 137, "SIGKILL")
        result = await vm.exec("kill -9 $$")
        assert result.reason == "signaled"
        result = await vm.exec_file("sh", ["-c", f'python3 -c "{eat}"; exit $?'])
        assert (result.reason, result.exit_code) == ("oom", 137)
        process = await vm.spawn("python3", ["-c", eat])
        assert (await process.wait_status()).reason == "oom"
        await still_works(vm)

    small = 48 * 1024 * 1024
    in_vm(body, limits=Limits(memory_bytes=small, disk_bytes=1024 * 1024, shm_bytes=1024 * 1024))


def test_two_kills_at_once_and_a_wait(in_vm: Any) -> None:
    """Kills and waits from several tasks all return."""

    async def body(vm: VM) -> None:
        process = await vm.spawn("sh", ["-c", "setsid sleep 1000 & sleep 1001"])
        waits = [asyncio.create_task(process.wait()) for _ in range(20)]
        await asyncio.gather(*(process.kill() for _ in range(5)))
        assert await asyncio.gather(*waits) == [137] * 20
        assert await commands(vm) == []

    in_vm(body)


def test_kills_never_hit_another_command(in_vm: Any) -> None:
    """While commands time out all the time, those beside them that are in time are never killed for them."""

    async def body(vm: VM) -> None:
        async def out_of_time() -> None:
            for _ in range(40):
                result = await vm.exec("sleep 1000 & sleep 1000", timeout=0.01)
                assert result.reason == "timeout"

        async def in_time() -> None:
            for _ in range(60):
                result = await vm.exec("read -t 0.02 < <(sleep 0.1); echo ok", on_leader_exit="wait")
                assert (result.stdout, result.reason) == ("ok\n", "exited")

        await asyncio.gather(*(out_of_time() for _ in range(4)), *(in_time() for _ in range(6)))

    in_vm(body)


def test_a_guest_that_kills_all_it_can_ends_only_itself(in_vm: Any) -> None:
    """`kill -9 -1` in the VM ends what runs as that user there, told as a signal; the VM works on at once."""

    async def body(vm: VM) -> None:
        for _ in range(5):
            process = await vm.spawn("sh", ["-c", "echo up; sleep 1000"])
            killer = await vm.spawn("bash", ["-c", "echo up; read go; kill -9 -1; exit 3"])
            for one in (process, killer):
                await Transcript(one).until(b"up\n")
            await killer.write_stdin("go\n")
            assert await killer.wait() == 3  # kill(2) spares who calls it
            assert await process.wait() == 137
            await still_works(vm)

    in_vm(body)


def test_a_guest_that_kills_everything_as_root_ends_only_itself(in_vm: Any) -> None:
    """The same by the VM's root."""

    async def body(vm: VM) -> None:
        process = await vm.spawn("sleep", ["1000"])
        killer = await vm.spawn("bash", ["-c", "echo up; read go; kill -9 -1; exit 3"], user="root")
        await Transcript(killer).until(b"up\n")
        await killer.write_stdin("go\n")
        assert await killer.wait() == 3
        assert await process.wait() == 137
        await still_works(vm)

    in_vm(body)


def test_a_guest_that_stops_all_it_can_holds_nothing_up(in_vm: Any) -> None:
    """`kill -STOP -1` keeps neither its own result, nor a time limit, nor the next command from coming."""

    async def body(vm: VM) -> None:
        for user in ("agentos", "root"):
            result = await vm.exec("kill -STOP -1; echo done", user=user)
            assert (result.stdout, result.reason) == ("done\n", "exited")
            result = await vm.exec("kill -STOP -1; echo -n on; sleep 1000", user=user, timeout=0.3)
            assert (result.stdout, result.reason) == ("on", "timeout")
            await still_works(vm)
        process = await vm.spawn("sleep", ["1000"])
        await vm.exec("kill -STOP -1")
        await process.signal("SIGTERM")
        await process.kill()
        assert await process.wait() == 137

    in_vm(body, limit=15)


def test_a_time_limit_holds_against_a_guest_that_stops_everything_over_and_over(in_vm: Any) -> None:
    """A loop of `kill -STOP -1` is ended by its timeout."""

    async def body(vm: VM) -> None:
        result = await vm.exec("while :; do kill -STOP -1; done", timeout=0.5)
        assert result.reason == "timeout"
        await still_works(vm)

    in_vm(body, limit=15)


WANDERER = """
#include <stdio.h>
#include <unistd.h>
int main(void) {
    puts("up"); fflush(stdout);
    for (;;) {
        pid_t child = fork();
        if (child > 0) _exit(0);
    }
}
"""
"""One process that is always elsewhere: it forks and ends, some ten thousand times a second."""


@needs_program("gcc")
def test_a_process_that_never_stays_is_caught(in_vm: Any) -> None:
    """One that does nothing but fork and end is dead after a timeout and after kills, twenty times in a row."""

    async def body(vm: VM) -> None:
        await vm.files.write_file("wander.c", WANDERER)
        (await vm.exec("gcc -O1 -o wander wander.c")).check()
        for _ in range(20):
            result = await vm.exec("./wander; sleep 1000", timeout=0.05)
            assert result.reason == "timeout"
            assert await commands(vm) == []
        for _ in range(10):
            process = await vm.spawn("sh", ["-c", "./wander; sleep 1000"])
            await Transcript(process).until(b"up\n")
            await process.kill()
            assert await commands(vm) == []
            await process.wait()

    in_vm(body)


HEADLESS = """
import ctypes, os, platform, sys, threading, time
def beat():
    with open("/tmp/headless", "ab", buffering=0) as file:
        file.write(b".")
        print("ready", flush=True)
        while True:
            file.write(b".")
            time.sleep(0.01)
threading.Thread(target=beat).start()
ctypes.CDLL(None).syscall({"x86_64": 60, "aarch64": 93}[platform.machine()], 0)
"""
"""A process whose first thread has ended while another goes on: the kernel shows it as a zombie."""


def test_a_process_whose_first_thread_has_ended_is_killed(in_vm: Any) -> None:
    """What /proc calls a zombie, but still runs, is dead after a kill and after a timeout."""

    async def body(vm: VM) -> None:
        process = await vm.spawn("python3", ["-c", HEADLESS])
        await Transcript(process).until(b"ready\n")
        await process.kill()
        await assert_stands_still(vm, "/tmp/headless")
        assert await process.wait() == 137
        script = 'python3 -c "$0" & read -t 0.5 < <(sleep 9); sleep 1000'
        result = await vm.exec_file("bash", ["-c", script, HEADLESS], timeout=1)
        assert (result.reason, result.stdout) == ("timeout", "ready\n")
        await assert_stands_still(vm, "/tmp/headless")

    in_vm(body)


def test_a_background_process_whose_first_thread_has_ended_is_named(in_vm: Any) -> None:
    """It is one of the orphans of its exec, and is waited for."""

    async def body(vm: VM) -> None:
        await vm.exec("mkfifo /tmp/fifo")
        script = 'python3 -c "$0" > /tmp/fifo & head -1 /tmp/fifo'
        result = await vm.exec_file("bash", ["-c", script, HEADLESS])
        assert result.stdout == "ready\n"
        assert len(result.orphans) == 1

    in_vm(body)


def test_a_command_that_kills_whoever_started_it_runs_once(in_vm: Any) -> None:
    """A hundred commands that kill all they can, themselves spared, each run exactly once and each have a result."""

    async def body(vm: VM) -> None:
        script = "echo ran >> /tmp/log; echo out; kill -9 -1"
        for _ in range(100):
            result = await vm.exec_file("bash", ["-c", script])
            assert result.stdout == "out\n"
            assert (result.exit_code, result.reason) in ((0, "exited"), (137, "signaled"))
        assert (await vm.exec("wc -l < /tmp/log")).stdout.strip() == "100"

    in_vm(body)
