"""Reads the event files of a folder with TensorBoard's own reader and prints what they hold as JSON.

usage: read_events.py FOLDER [--cut]     with --cut also reads each file cut off at each of its last bytes

Exits with code 77 where there is no TensorBoard.
"""

import json
import pathlib
import sys
import tempfile

try:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
except ImportError as error:
    print(error, file=sys.stderr)
    sys.exit(77)

# How many bytes are cut off at most: more than the last record has.
CUT = 200

folder = pathlib.Path(sys.argv[1])
events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "histograms": 0}).Reload()
tags = events.Tags()


def hparams(tag: str) -> HParamsPluginData:
    content = events.PluginTagToContent("hparams")[tag]
    return HParamsPluginData.FromString(content)


def value(of):
    return getattr(of, of.WhichOneof("kind"))


def count(path: pathlib.Path) -> int:
    return sum(1 for _ in EventFileLoader(str(path)).Load())


def cut(path: pathlib.Path) -> list:
    """How many events are read of a file that lost so many bytes."""
    data = path.read_bytes()
    with tempfile.TemporaryDirectory() as scratch:
        shorter = pathlib.Path(scratch) / path.name
        counts = []
        for lost in range(CUT):
            shorter.write_bytes(data[: len(data) - lost])
            counts.append(count(shorter))
        return counts


read = {
    "version": events.file_version,
    "scalars": {tag: [[e.step, e.value] for e in events.Scalars(tag)] for tag in tags["scalars"]},
    "histograms": {
        tag: [
            [e.step, h.num, sum(h.bucket), h.min, h.max, h.sum, h.sum_squares, len(h.bucket_limit) - len(h.bucket)]
            for e in events.Histograms(tag)
            for h in [e.histogram_value]
        ]
        for tag in tags["histograms"]
    },
    "files": sorted(path.name for path in folder.glob("*tfevents*")),
}
plugins = events.PluginTagToContent("hparams") if "hparams" in events._plugin_to_tag_to_content else {}
if "_hparams_/session_start_info" in plugins:
    info = hparams("_hparams_/session_start_info").session_start_info
    read["hparams"] = {name: value(of) for name, of in info.hparams.items()}
if "_hparams_/session_end_info" in plugins:
    read["status"] = hparams("_hparams_/session_end_info").session_end_info.status
if "--cut" in sys.argv:
    read["cut"] = [cut(folder / name) for name in read["files"]]
print(json.dumps(read))
