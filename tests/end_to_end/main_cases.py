"""A program whose calls use its own `__main__` in every way we could think of. It prints a line for each case.

Run by test_main.py, which gives it the start method and whether the first call is made before or behind the
definitions, and reads the lines. A case is a function whose name begins with "case_"; it uses `call`, which runs a call
in the one worker and returns its result.
"""

from __future__ import annotations

import abc
import collections
import contextvars
import dataclasses
import enum
import functools
import multiprocessing
import os
import sys
import tempfile
import threading
import traceback
import typing
import weakref

import numpy as np

import scaler_executor

START_METHOD, MOMENT = sys.argv[1:]
IS_INHERITED = (START_METHOD, MOMENT) == ("fork", "behind")


def make_executor():
    return scaler_executor.ScalerExecutor(1, multiprocessing.get_context(START_METHOD))


executor = None
if MOMENT == "before":
    executor = make_executor()
    executor.submit(abs, -1).result()  # workers are made with the first call


def call(function, *args, **kwargs):
    return executor.submit(function, *args, **kwargs).result(60)


# Globals

model = None


def load_model():
    global model, scale
    model, scale = {"weight": 3}, 5


def use_model(x):
    return model["weight"] * x + scale


def case_a_call_sets_globals_for_later_calls():
    call(load_model)
    assert call(use_model, 2) == 11
    assert model is None


counter = 0


def count():
    global counter
    counter += 1
    return counter


def case_counter():
    assert [call(count) for _ in range(3)] == [1, 2, 3]
    assert counter == 0


def case_counter_set_anew():
    global counter
    call(count)
    counter = 100
    assert [call(count), call(count)] == [101, 102]


memo = {}


def fibonacci(n):
    if n not in memo:
        memo[n] = n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)
    return memo[n]


def memo_size():
    return len(memo)


def case_memo_and_recursion():
    assert call(fibonacci, 30) == 832040
    assert call(memo_size) == 31 and memo == {}


@functools.cache
def cached(x):
    return x * 3


def cache_hits():
    return cached.cache_info().hits


def case_lru_cache():
    assert call(cached, 2) == call(cached, 2) == 6
    assert call(cache_hits) == 1


def is_even(n):
    return n == 0 or is_odd(n - 1)


def is_odd(n):
    return n != 0 and is_even(n - 1)


def case_functions_that_call_each_other():
    assert call(is_even, 10) is True


settings = {"rate": 1}


def get_rate():
    return settings["rate"]


def case_small_content_changed_in_place():
    assert call(get_rate) == 1
    settings["rate"] = 2
    assert call(get_rate) == (1 if IS_INHERITED else 2)  # what was inherited is as it was at the fork


first_name = second_name = [1]


def have_one_object():
    return first_name is second_name


def case_two_names_of_one_object():
    assert call(have_one_object)


class Point:
    made = 0

    def __init__(self, x):
        self.x = x
        Point.made += 1

    def square(self):
        return self.x**2

    @classmethod
    def make(cls, x):
        return cls(x)

    @staticmethod
    def double(x):
        return 2 * x

    @property
    def twice(self):
        return self.x * 2

    class Inner:
        value = 7


some_point = Point(3)


def use_instance():
    some_point.x += 1
    return some_point.x


def case_instance_as_global():
    assert [call(use_instance), call(use_instance)] == [4, 5]


def set_fresh():
    global fresh
    fresh = 8


def get_fresh():
    return fresh


def case_global_that_only_workers_have():
    call(set_fresh)
    assert call(get_fresh) == 8


def get_dunder_name():
    return __name__


def case_dunder_name():
    assert call(get_dunder_name) == "__main__"


def get_by_string():
    return globals()["memo"] is memo


def case_globals_function():
    assert call(get_by_string)


big = np.arange(12_500_000.0)


def use_big():
    return float(big[5])


def case_global_of_100_megabytes():
    assert call(use_big) == 5.0
    assert call(use_big) == 5.0


def use_modules():
    return os.path.basename("/a/b") + str(np.arange(3).sum())


def case_modules():
    assert call(use_modules) == "b3"


lock, reentrant = threading.Lock(), threading.RLock()


def use_locks():
    with lock, reentrant:
        return 1


def case_lock():
    assert call(use_locks) == 1


open_file = tempfile.TemporaryFile()  # noqa: SIM115
request = contextvars.ContextVar("request", default=("none", 0))
user = contextvars.ContextVar("user")


class Logged:
    level = contextvars.ContextVar("level", default=3)


def use_context_variables():
    assert request.name == "request" and user.name == "user"
    assert request.get() == ("none", 0) and user.get("nobody") == "nobody" and Logged.level.get() == 3
    token = request.set(("some", 1))
    changed = request.get()
    request.reset(token)
    return changed, request.get()


def set_user(name):
    before = user.get("nobody")
    user.set(name)
    return before


def get_user():
    return user.get("nobody")


def case_context_variables():
    request.set(("what the client has", 9))
    assert call(use_context_variables) == (("some", 1), ("none", 0))
    assert [call(set_user, "Ann"), call(set_user, "Bob"), call(get_user)] == ["nobody", "Ann", "Bob"]
    assert get_user() == "nobody"


scratch = threading.local()


class Scratch(threading.local):
    def __init__(self):
        self.items = []


class Sized(threading.local):
    def __init__(self, size=1):
        self.size = size


class Reduced(threading.local):
    size = 0

    def __reduce__(self):
        return make_reduced, (self.size,)


def make_reduced(size):
    made = Reduced()
    made.size = size
    return made


typed_scratch, sized, reduced = Scratch(), Sized(5), make_reduced(6)


def use_thread_locals():
    scratch.calls = getattr(scratch, "calls", 0) + 1
    typed_scratch.items.append(1)
    thread = threading.Thread(target=lambda: seen.append((hasattr(scratch, "calls"), typed_scratch.items)))
    seen = []
    thread.start()
    thread.join()
    return scratch.calls, len(typed_scratch.items), type(typed_scratch) is Scratch, seen


def use_sized():
    return sized.size


def use_reduced():
    return reduced.size


def case_thread_locals():
    assert [call(use_thread_locals) for _ in range(2)] == [(n, n, True, [(False, [])]) for n in (1, 2)]
    assert call(use_reduced) == 6
    if IS_INHERITED:
        assert call(use_sized) == 5
    else:
        assert_missing("sized", use_sized)


class Node:
    known = weakref.WeakSet()
    by_name = weakref.WeakValueDictionary()

    def __init__(self, name):
        self.name = name
        self.known.add(self)
        self.by_name[name] = self


nodes = weakref.WeakSet()
notes = weakref.WeakKeyDictionary()
kept = []
client_node = Node("client's")
client_node.file = open_file
nodes.add(client_node)
notes[client_node] = 1


def use_weak_containers(name, is_kept):
    node = Node(name)
    nodes.add(node)
    notes[node] = len(notes)
    assert node in Node.known and Node.by_name[name] is node and node in nodes
    if is_kept:
        kept.append(node)
    del node
    return sorted(Node.by_name), len(Node.known), len(nodes), len(notes)


def case_weak_containers():
    inherited = ["client's"] if IS_INHERITED else []
    many = len(inherited)
    assert call(use_weak_containers, "a", True) == (["a", *inherited], *[1 + many] * 3)
    another = Node("another of the client's")  # does not empty those of the worker
    nodes.add(another)
    assert call(use_weak_containers, "b", True) == (["a", "b", *inherited], *[2 + many] * 3)
    assert call(use_weak_containers, "c", False) == (["a", "b", *inherited], *[2 + many] * 3)


class Shape:
    kinds = weakref.WeakValueDictionary()
    subclasses = weakref.WeakSet()

    def __init_subclass__(cls):
        Shape.kinds[cls.__name__] = cls
        Shape.subclasses.add(cls)


class Circle(Shape):
    pass


class Square(Shape):
    pass


corners = weakref.WeakKeyDictionary({Circle: 0, Square: 4})


def use_registries():
    found = Shape.kinds["Circle"] is Circle and set(Shape.subclasses) == {Circle, Square}
    return found, corners[Square], type(Shape.kinds["Square"]()) is Square


def case_weak_registries_of_classes():
    client_shape = Shape()
    Shape.kinds["client's"] = client_shape
    assert call(use_registries) == (True, 4, True)


def remember(function):
    results, own, depth = weakref.WeakKeyDictionary(), threading.local(), contextvars.ContextVar("depth", default=0)

    @functools.wraps(function)
    def wrapper(key):
        own.calls = getattr(own, "calls", 0) + 1
        depth.set(depth.get() + 1)
        if key not in results:
            results[key] = function(key)
        return results[key], own.calls, depth.get()

    return wrapper


@remember
def name_of(cls):
    return cls.__name__


def case_such_values_in_closures():
    assert [call(name_of, Circle), call(name_of, Circle)] == [("Circle", 1, 1), ("Circle", 2, 2)]


def case_such_values_as_arguments():
    for value in (lock, request, scratch, typed_scratch, notes, Node.by_name):
        try:
            call(type, value)
        except TypeError as error:
            assert "pickle" in str(error), error
        else:
            raise AssertionError(f"{value!r} was sent")


def use_file(really):
    return open_file.name if really else "not used"


def use_executor(really):
    return executor.submit(abs, -1).result() if really else "not used"


def case_globals_that_cannot_be_sent():
    assert call(use_file, False) == call(use_executor, False) == "not used"
    if IS_INHERITED:
        assert call(use_file, True) == open_file.name
        return
    assert_missing("open_file", use_file, True)


def assert_missing(name, function, *args):
    try:
        call(function, *args)
    except NameError as error:
        told = str(getattr(error, "__notes__", "")) + str(error)
        assert name in told and "could not be sent" in told, told
    else:
        raise AssertionError("no NameError")


# Redefinition, as in a notebook


def helper():
    return 1


def caller():
    return helper()


def case_redefinition():
    global helper, caller

    assert call(caller) == 1

    def helper():
        return 2

    helper.__qualname__ = "helper"
    assert call(caller) == 2

    def caller():
        return helper() * 10

    caller.__qualname__ = "caller"
    assert call(caller) == 20
    assert call(fibonacci, 10) == 55


class Versioned:
    value = 1


def make_versioned():
    return Versioned()


def case_class_redefined():
    global Versioned
    assert call(make_versioned).value == 1

    class Versioned:
        value = 2

    Versioned.__qualname__ = "Versioned"
    assert call(make_versioned).value == 2 and type(call(make_versioned)) is Versioned


class Patched:
    def method(self):
        return "before"


def use_patched():
    return Patched().method()


def case_method_replaced():
    assert call(use_patched) == "before"
    Patched.method = lambda self: "after"
    assert call(use_patched) == ("before" if IS_INHERITED else "after")


# Classes


def make_point(x):
    return Point(x)


def points_made():
    return Point.made


def is_point(value):
    return isinstance(value, Point)


def make_inner():
    return Point.Inner()


def case_classes():
    assert type(call(make_point, 3)) is Point and call(make_point, 3).x == 3
    assert call(is_point, Point(1)) and call(Point(5).square) == 25 and call(Point.square, Point(4)) == 16
    assert call(Point.make, 5).twice == 10 and call(Point.double, 4) == 8
    assert type(call(make_inner)) is Point.Inner


def case_class_attributes():
    before = call(points_made)
    call(make_point, 1)
    Point(1)
    call(is_point, Point(2))
    assert call(points_made) == before + 1


class Special(Point):
    def __init__(self, x):
        super().__init__(x)
        self.y = 1

    def square(self):
        return super().square() + 1


def make_special(x):
    return Special(x)


def case_inheritance():
    assert call(make_special, 3).square() == 10 and type(call(make_special, 3)) is Special


@dataclasses.dataclass
class Record:
    a: int
    b: list = dataclasses.field(default_factory=list)
    c: typing.ClassVar[int] = 3


@dataclasses.dataclass(frozen=True, slots=True)
class Slotted:
    a: int


def use_records(record, slotted):
    fields = [field.name for field in dataclasses.fields(record)]
    return dataclasses.replace(record, a=record.a + 1), fields, dataclasses.asdict(record), Slotted(slotted.a + 1)


def case_dataclasses():
    assert call(use_records, Record(1, [2]), Slotted(1)) == (
        Record(2, [2]),
        ["a", "b"],
        {"a": 1, "b": [2]},
        Slotted(2),
    )


class Colour(enum.Enum):
    RED = 1
    BLUE = 2


class Flag(enum.IntFlag):
    A = 1
    B = 2


def use_enums(colour, flag):
    return Colour.BLUE if colour is Colour.RED else None, Flag.A | flag


def case_enums():
    assert call(use_enums, Colour.RED, Flag.B) == (Colour.BLUE, Flag.A | Flag.B)


class ProgramError(Exception):
    def __init__(self, a, b):
        super().__init__(a, b)
        self.b = b


def fail():
    raise ProgramError(1, 2)


def case_exceptions():
    try:
        call(fail)
    except ProgramError as error:
        assert error.b == 2 and type(error) is ProgramError
    else:
        raise AssertionError("nothing raised")


class Abstract(abc.ABC):
    @abc.abstractmethod
    def run(self): ...


class Concrete(Abstract):
    def run(self):
        return 1


def use_abstract():
    return Concrete().run(), isinstance(Concrete(), Abstract)


def case_abstract_classes():
    assert call(use_abstract) == (1, True)


Pair = collections.namedtuple("Pair", "a b")


class TypedPair(typing.NamedTuple):
    a: int
    b: int = 2


def make_pairs(x):
    return Pair(x, 1), TypedPair(x)


def case_named_tuples():
    pairs = call(make_pairs, 1)
    assert pairs == (Pair(1, 1), TypedPair(1)) and type(pairs[1]) is TypedPair


class Meta(type):
    def __new__(mcs, name, bases, namespace):
        namespace["tag"] = name
        return super().__new__(mcs, name, bases, namespace)


class WithMeta(metaclass=Meta):
    pass


def use_metaclass():
    return WithMeta.tag, type(WithMeta) is Meta


def case_metaclass():
    assert call(use_metaclass) == ("WithMeta", True)


T = typing.TypeVar("T")


class Box(typing.Generic[T]):
    def get(self, item: T) -> T:
        return item


def use_generic():
    return Box[int]().get(3)


def case_generic_class():
    assert call(use_generic) == 3


class Plugin:
    known = []

    def __init_subclass__(cls, *, key, **options):
        Plugin.known.append(key)


class SomePlugin(Plugin, key="some"):
    pass


def get_plugins():
    return SomePlugin.__name__, list(Plugin.known)


def case_hook_for_subclasses():
    assert call(get_plugins) == ("SomePlugin", ["some"])


class Vehicle:
    kinds = []
    descriptions = {}

    def __init_subclass__(cls):
        Vehicle.kinds.append(cls)
        Vehicle.descriptions[cls] = cls.describe


class Bike(Vehicle):
    wheels = 2

    def describe(self):
        return self.wheels, Car.wheels


class Car(Vehicle):
    wheels = 4

    def describe(self):
        return self.wheels, Van.wheels


class Van(Car):
    wheels = 6


def describe_vehicles():
    assert all(globals()[kind.__name__] is kind and issubclass(kind, Vehicle) for kind in Vehicle.kinds)
    return [Vehicle.descriptions[kind](kind()) for kind in Vehicle.kinds]


def case_class_that_lists_its_subclasses():
    global Vehicle, Car
    assert call(Bike().describe) == (2, 4)
    assert call(describe_vehicles) == [(2, 4), (4, 6), (6, 6)]
    assert [type(call(kind)) for kind in Vehicle.kinds] == [Bike, Car, Van]

    class Vehicle:
        kinds = []
        descriptions = {}

        def __init_subclass__(cls):
            Vehicle.kinds.append(cls)
            Vehicle.descriptions[cls] = lambda vehicle: vehicle.wheels

    class Car(Vehicle):
        wheels = 3

    Vehicle.__qualname__, Car.__qualname__ = "Vehicle", "Car"
    assert call(describe_vehicles) == [3]
    assert type(call(Car)) is Car


class Slots:
    __slots__ = ("a",)


def make_slots():
    made = Slots()
    made.a = 1
    return made


def case_slots():
    made = call(make_slots)
    assert made.a == 1 and not hasattr(made, "__dict__")


class Parent:
    pass


class Child:
    other = Parent


Parent.other = Child


def use_cycle():
    return Parent.other is Child and Child.other is Parent


def case_classes_that_name_each_other():
    assert call(use_cycle)


# Functions


def decorate(function):
    @functools.wraps(function)
    def wrapper(*args):
        wrapper.calls = getattr(wrapper, "calls", 0) + 1
        return function(*args) + 1

    return wrapper


@decorate
def decorated(x):
    return x * 2


def calls_of_decorated():
    return decorated.calls


def case_decorator():
    assert call(decorated, 2) == call(decorated, 2) == 5
    assert call(calls_of_decorated) == 2


@functools.singledispatch
def describe(value):
    return "something"


@describe.register
def _(value: int):
    return "a number"


def use_single_dispatch():
    return describe(1), describe("")


def case_single_dispatch():
    assert call(use_single_dispatch) == ("a number", "something")


def make_adder(k):
    def add(x):
        return x + k + is_even(2)

    return add


def make_factorial():
    def factorial(n):
        return 1 if n == 0 else n * factorial(n - 1)

    return factorial


def case_closures_and_lambdas():
    assert call(make_adder(5), 1) == 7
    assert call(lambda x: x + is_even(2), 1) == 2
    assert call(make_factorial(), 5) == 120
    assert call(functools.partial(use_by_name, 3)) == 6


def use_by_name(x):
    return Point.double(x)


def generate():
    yield 1


async def coroutine():
    return 3


def run_coroutine():
    import asyncio

    return asyncio.run(coroutine())


def case_generators_and_coroutines():
    assert call(lambda: list(generate())) == [1]
    assert call(run_coroutine) == 3


def return_function():
    return use_by_name


def return_lambda():
    return lambda: is_even(2)


def case_functions_as_results():
    assert call(return_function) is use_by_name
    assert call(return_lambda)() is True


def annotated(point: Point, other: Meta = None) -> Colour:
    return point.x


def case_annotations():
    assert call(annotated, Point(4)) == 4


named_itself = [None]


def find_itself():
    return named_itself[0] is find_itself


named_itself[0] = find_itself


def case_cycle_through_a_list():
    assert call(find_itself)


def square(x):
    return x * x


def norm(point):
    return point.square()


def case_map():
    assert list(executor.map(square, range(100))) == [x * x for x in range(100)]
    assert list(executor.map(norm, [Point(1), Point(2)])) == [1, 4]
    assert list(executor.map(lambda x: square(x) + 1, range(3))) == [1, 2, 5]


if __name__ == "__main__":
    executor = executor or make_executor()
    for name, case in list(globals().items()):
        if name.startswith("case_"):
            try:
                case()
            except BaseException as error:
                traceback.print_exc()
                print(f"{name}: {error!r}", flush=True)
            else:
                print(f"{name}: good", flush=True)
    executor.shutdown()
