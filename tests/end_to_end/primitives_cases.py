"""Cases of `test_primitives`: what of multiprocessing may be given to workers, and how."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import socket
import sys
from collections.abc import Callable
from multiprocessing.shared_memory import SharedMemory
from typing import Any

from comparison import Pools, attempt

_given: tuple[Any, ...] = ()


def give(*values: Any) -> None:
    global _given
    _given = values


def run_on_given(call: Callable[..., Any], *args: Any) -> Any:
    return call(*_given, *args)


def settle(executor: Any, fn: Any, /, *args: Any) -> Any:
    return attempt(lambda: executor.submit(fn, *args).result(30))


def with_given(pools: Pools, values: tuple[Any, ...], calls: list[Callable[..., Any]], *args: Any) -> list[Any]:
    """Give values to the initializer of one worker; return what the calls find."""
    with pools(1, initializer=give, initargs=values) as executor:
        return [settle(executor, run_on_given, call, *args) for call in calls]


# What a worker does with them


def acquire(lock: Any) -> Any:
    return lock.acquire(timeout=30)


def try_acquire(lock: Any) -> Any:
    return lock.acquire(False)


def release(lock: Any) -> Any:
    return attempt(lock.release)


def is_set(event: Any) -> Any:
    return event.wait(30), event.is_set()


def clear(event: Any) -> None:
    event.clear()


def notify(condition: Any) -> None:
    with condition:
        condition.notify_all()


def meet(barrier: Any) -> Any:
    return barrier.wait(30) in (0, 1), barrier.parties


def answer(questions: Any, answers: Any) -> None:
    question = questions.get()
    answers.put([question, "answered"])


def answer_joinable(questions: Any, answers: Any) -> None:
    question = questions.get()
    answers.put([question, "answered"])
    questions.task_done()


def answer_connection(connection: Any) -> None:
    connection.send([connection.recv(), "answered"])


def change_value(value: Any) -> Any:
    with value.get_lock():
        value.value += 1.5
    return value.value


def change_array(array: Any) -> Any:
    array[1] = 7
    return list(array)


def change_string(array: Any) -> Any:
    array.value = b"changed"
    return array.value


def change_shared(shared: SharedMemory) -> Any:
    shared.buf[0] = 99
    shared.close()
    return shared.size >= 16


def change_proxies(numbers: Any, names: Any, place: Any, lock: Any) -> Any:
    with lock:
        numbers.append(3)
        names["key"] = "value"
        place.number = 5
    return list(numbers), dict(names)


# initargs


def locks(pools: Pools) -> object:
    made = pools.primitives
    seen = {}
    for name in ("Lock", "RLock", "Semaphore", "BoundedSemaphore"):
        lock = getattr(made, name)()
        first = with_given(pools, (lock,), [acquire, try_acquire, release, release, release])
        lock.acquire()
        seen[name] = first, with_given(pools, (lock,), [try_acquire]), attempt(lock.release)
    return seen


def events(pools: Pools) -> object:
    made = pools.primitives
    event = made.Event()
    event.set()
    seen = [with_given(pools, (event,), [is_set, clear]), event.is_set()]
    condition = made.Condition()
    with pools(1, initializer=give, initargs=(condition,)) as executor, condition:
        future = executor.submit(run_on_given, notify)
        seen.append(condition.wait(30))
        future.result(30)
    barrier = made.Barrier(2)
    with pools(1, initializer=give, initargs=(barrier,)) as executor:
        future = executor.submit(run_on_given, meet)
        seen += [barrier.wait(30) in (0, 1), future.result(30)]
    return seen


def queues(pools: Pools) -> object:
    made = pools.primitives
    seen = {}
    for name in ("Queue", "SimpleQueue", "JoinableQueue"):
        questions, answers = getattr(made, name)(), getattr(made, name)()
        questions.put("question")
        call = answer_joinable if name == "JoinableQueue" else answer
        seen[name] = with_given(pools, (questions, answers), [call]), answers.get()
        if name == "JoinableQueue":
            questions.join()
    return seen


def pipes(pools: Pools) -> object:
    here, there = pools.primitives.Pipe()
    here.send("question")
    seen = [with_given(pools, (there,), [answer_connection]), here.recv()]
    here.close()
    there.close()
    return seen


def shared_values(pools: Pools) -> object:
    made = pools.primitives
    value, array, text = made.Value("d", 1.0), made.Array("i", 3), made.Array("c", 20)
    raw, structure = made.RawArray("i", [1, 2, 3]), made.Value("i", 5, lock=False)
    return [
        (with_given(pools, (value,), [change_value, change_value]), value.value),
        (with_given(pools, (array,), [change_array]), list(array)),
        (with_given(pools, (text,), [change_string]), text.value),
        (with_given(pools, (raw,), [change_array]), list(raw)),
        with_given(pools, (structure,), [lambda_free_value]),
    ]


def lambda_free_value(value: Any) -> Any:
    return value.value


def many_together(pools: Pools) -> object:
    """Many descriptors, and the same object twice."""
    made = pools.primitives
    lock = made.Lock()
    queue = made.Queue()
    values = (lock, {"lock": lock, "queue": queue}, [made.Event() for _ in range(40)], made.Pipe(), made.Value("i", 3))
    return with_given(pools, values, [look_at_many])


def look_at_many(lock: Any, both: Any, events: Any, pipe: Any, value: Any) -> Any:
    events[39].set()
    pipe[0].send(1)
    return lock is both["lock"], len(events), events[0].is_set(), events[39].is_set(), pipe[1].recv(), value.value


def shared_memory(pools: Pools) -> object:
    shared = SharedMemory(create=True, size=16)
    try:
        seen = [with_given(pools, (shared,), [change_shared]), shared.buf[0]]
        shared.buf[0] = 0
        with pools() as executor:
            seen += [settle(executor, change_shared, shared), shared.buf[0]]
    finally:
        shared.close()
        shared.unlink()
    return seen


def managers(pools: Pools) -> object:
    with pools.primitives.Manager() as manager:
        shared = (manager.list([1, 2]), manager.dict(), manager.Namespace(), manager.Lock())
        seen = [with_given(pools, shared, [change_proxies]), list(shared[0]), dict(shared[1]), shared[2].number]
        with pools() as executor:
            seen += [settle(executor, change_proxies, *shared), list(shared[0])]
            queue = manager.Queue()
            seen += [settle(executor, queue.put, "put"), queue.get()]
            # A proxy comes back as a proxy.
            seen += [settle(executor, echo, shared[0])._getvalue()]
            seen += [settle(executor, is_same_key, manager.address)]
    return seen


def echo(value: Any) -> Any:
    return value


def is_same_key(address: Any) -> Any:
    """A worker may connect to what has the client's key."""
    import multiprocessing.managers

    manager = multiprocessing.managers.BaseManager(address=address, authkey=multiprocessing.current_process().authkey)
    manager.connect()
    return "connected"


# Arguments and results


def as_arguments(pools: Pools) -> object:
    """Refused, with the same words."""
    made = pools.primitives
    values = [made.Lock(), made.RLock(), made.Semaphore(2), made.Event(), made.Condition(), made.Barrier(2)]
    values += [made.Queue(), made.SimpleQueue(), made.JoinableQueue(), made.Value("i", 1), made.Array("i", 2)]
    values += [made.RawValue("i", 1), made.RawArray("i", 2), made.Value("i", 1, lock=False)]
    with pools() as executor:
        seen = [settle(executor, type, value) for value in values]
        seen += [settle(executor, make_primitive, name) for name in ("Lock", "Queue", "Value", "Event")]
        seen.append(settle(executor, abs, -1))
    return [str(item) for item in seen]


def make_primitive(name: str) -> Any:
    arguments = ("i", 1) if name == "Value" else ()
    return getattr(multiprocessing, name)(*arguments)


def connections_as_arguments(pools: Pools) -> object:
    """Connections and sockets travel as copies, by descriptor."""
    here, there = pools.primitives.Pipe()
    one, other = socket.socketpair()
    here.send("question")
    with pools() as executor:
        seen = [settle(executor, answer_connection, there), here.recv()]
        seen += [settle(executor, send_text, other), one.recv(100)]
        connection = executor.submit(make_connection).result(30)
        seen.append(connection.recv())
        connection.close()
        made = executor.submit(make_socket).result(30)
        seen.append(made.recv(100))
        made.close()
        listener = socket.create_server(("127.0.0.1", 0))
        future = executor.submit(accept_one, listener)
        with socket.create_connection(listener.getsockname()) as client:
            seen += [client.recv(100), future.result(30)]
        listener.close()
    for end in (here, there, one, other):
        end.close()
    return seen


def send_text(end: socket.socket) -> None:
    end.sendall(b"sent")
    end.close()


def make_connection() -> Any:
    here, there = multiprocessing.Pipe()
    there.send("made in a worker")
    there.close()
    return here


def make_socket() -> Any:
    here, there = socket.socketpair()
    there.sendall(b"made in a worker")
    there.close()
    return here


def accept_one(listener: socket.socket) -> Any:
    with listener, listener.accept()[0] as accepted:
        accepted.sendall(b"hello")
    return "accepted"


# What a worker is


def who(_: object = None) -> Any:
    process = multiprocessing.current_process()
    parent = multiprocessing.parent_process()
    assert parent is not None
    return {
        "daemon": process.daemon,
        "pid": process.pid == os.getpid(),
        "is alive": process.is_alive(),
        "exitcode": process.exitcode,
        "parent name": parent.name,
        "parent alive": parent.is_alive(),
        "children": multiprocessing.active_children(),
        "method": multiprocessing.get_start_method(),
        "key": len(process.authkey),
        "argv": sys.argv[1:3],
    }


def identity(pools: Pools) -> object:
    with pools() as executor:
        return settle(executor, who)


def parent(pools: Pools) -> object:
    with pools() as executor:
        return executor.submit(parent_pid).result(30) == os.getpid()


def parent_pid() -> Any:
    found = multiprocessing.parent_process()
    return found and found.pid


def name_of_process() -> str:
    return multiprocessing.current_process().name
