"""The files that JAX's profiler writes: XSpace messages, and the compiled programs in them.

Only the fields that are read here are declared; protobuf skips the others. Names and numbers are those of
tsl/profiler/protobuf/xplane.proto and xla/service/hlo.proto, which neither jax nor tensorboard bring along for Python;
jax.profiler.ProfileData reads the first of them only, and without what events of one kind have in common.
"""

import functools
import os
from typing import Any

from etils import epath
from google.protobuf import descriptor_pb2, descriptor_pool, message, message_factory

from lm.errors import StorageError
from lm.files import reason

_PACKAGE = "lm.profile"
# Fields by name: number and type; * repeats, {} maps int64 to it. A message is named, all else is a scalar.
_MESSAGES = {
    "XSpace": {"planes": (1, "*XPlane")},
    "XPlane": {
        "name": (2, "string"),
        "lines": (3, "*XLine"),
        "event_metadata": (4, "{}XEventMetadata"),
        "stat_metadata": (5, "{}XStatMetadata"),
        "stats": (6, "*XStat"),
    },
    "XLine": {
        "id": (1, "int64"),
        "name": (2, "string"),
        "timestamp_ns": (3, "int64"),
        "events": (4, "*XEvent"),
    },
    "XEvent": {
        "metadata_id": (1, "int64"),
        "offset_ps": (2, "int64"),
        "duration_ps": (3, "int64"),
        "stats": (4, "*XStat"),
    },
    "XStat": {
        "metadata_id": (1, "int64"),
        "double_value": (2, "double"),
        "uint64_value": (3, "uint64"),
        "int64_value": (4, "int64"),
        "str_value": (5, "string"),
        "bytes_value": (6, "bytes"),
        "ref_value": (7, "uint64"),
    },
    "XEventMetadata": {
        "id": (1, "int64"),
        "name": (2, "string"),
        "display_name": (4, "string"),
        "stats": (5, "*XStat"),
    },
    "XStatMetadata": {"id": (1, "int64"), "name": (2, "string")},
    "HloProto": {"hlo_module": (1, "HloModuleProto")},
    "HloModuleProto": {
        "name": (1, "string"),
        "entry_computation_id": (6, "int64"),
        "computations": (3, "*HloComputationProto"),
        "stack_frame_index": (17, "StackFrameIndexProto"),
    },
    "HloComputationProto": {
        "name": (1, "string"),
        "instructions": (2, "*HloInstructionProto"),
        "id": (5, "int64"),
    },
    "HloInstructionProto": {
        "name": (1, "string"),
        "opcode": (2, "string"),
        "metadata": (7, "OpMetadata"),
        "custom_call_target": (28, "string"),
        "id": (35, "int64"),
        "operand_ids": (36, "*int64"),
        "called_computation_ids": (38, "*int64"),
    },
    "OpMetadata": {
        "op_name": (2, "string"),
        "source_file": (3, "string"),
        "source_line": (4, "int32"),
        "stack_frame_id": (15, "int32"),
    },
    "StackFrameIndexProto": {
        "file_names": (1, "*string"),
        "file_locations": (3, "*FileLocation"),
        "stack_frames": (4, "*StackFrame"),
    },
    "FileLocation": {"file_name_id": (1, "int32"), "line": (3, "int32")},
    "StackFrame": {"file_location_id": (1, "int32"), "parent_frame_id": (2, "int32")},
}
_OPTIONAL = descriptor_pb2.FieldDescriptorProto.LABEL_OPTIONAL
_ONEOF = {"XStat": ("double_value", "uint64_value", "int64_value", "str_value", "bytes_value", "ref_value")}


@functools.cache
def message_type(name: str) -> type[message.Message]:
    """The class of a message of _MESSAGES."""
    return message_factory.GetMessageClass(_pool().FindMessageTypeByName(f"{_PACKAGE}.{name}"))


def parse(name: str, data: bytes) -> Any:
    """A message of the type of that name. Raises google.protobuf.message.DecodeError."""
    found = message_type(name)()
    found.ParseFromString(data)
    return found


def read(path: str | os.PathLike[str]) -> Any:
    """The XSpace in a file *.xplane.pb, local or in a bucket.

    Raises:
      StorageError: it cannot be read, or is none.
    """
    file = epath.Path(path)
    try:
        data = file.read_bytes()
    except Exception as error:  # storage libraries raise classes of their own beside OSError
        raise StorageError(f"cannot read {file}: {reason(error)}") from error
    try:
        space = parse("XSpace", data)
    except message.DecodeError as error:
        raise StorageError(
            f"{file} ({len(data):,} bytes) is damaged: it cannot be decoded as a trace; take another with `lm profile "
            "RUN --now`, or one that is listed by --trace"
        ) from error
    if not space.planes:
        raise StorageError(f"{file} ({len(data):,} bytes) holds nothing: the profiler was ended before it could write")
    return space


@functools.cache
def _pool() -> descriptor_pool.DescriptorPool:
    file = descriptor_pb2.FileDescriptorProto(name="lm/profile.proto", package=_PACKAGE, syntax="proto3")
    for name, fields in _MESSAGES.items():
        declared = file.message_type.add(name=name)
        if name in _ONEOF:
            declared.oneof_decl.add(name="value")
        for field, (number, kind) in fields.items():
            made = declared.field.add(name=field, number=number, label=_OPTIONAL)
            if kind.startswith(("*", "{}")):
                made.label = descriptor_pb2.FieldDescriptorProto.LABEL_REPEATED
            if field in _ONEOF.get(name, ()):
                made.oneof_index = 0
            kind = kind.removeprefix("*")
            if kind.startswith("{}"):
                kind = _add_entry(declared, field, kind.removeprefix("{}"))
            _set_type(made, kind)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return pool


def _set_type(field: Any, kind: str) -> None:
    if scalar := getattr(descriptor_pb2.FieldDescriptorProto, f"TYPE_{kind.upper()}", None):
        field.type = scalar
    else:
        field.type = descriptor_pb2.FieldDescriptorProto.TYPE_MESSAGE
        field.type_name = f".{_PACKAGE}.{kind}"


def _add_entry(declared: Any, field: str, kind: str) -> str:
    """Declares the entries of a map, which to protobuf are a message in this message; returns its name."""
    name = "".join(word.capitalize() for word in field.split("_")) + "Entry"
    entry = declared.nested_type.add(name=name)
    entry.options.map_entry = True
    for part, number, of in (("key", 1, "int64"), ("value", 2, kind)):
        made = entry.field.add(name=part, number=number, label=_OPTIONAL)
        _set_type(made, of)
    return f"{declared.name}.{name}"
