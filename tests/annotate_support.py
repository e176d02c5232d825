"""Programs that write whole-body masks: a thresholding tool, and a script that plays TotalSegmentator."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from data_shards.ingest.annotate_config import AnnotateConfig

# Labels what is brighter than 60 as liver, unless a file beside it, named by case, says what to do instead.
TOOL = """
import sys, time
from pathlib import Path
if sys.argv[1] == "--version":
    print("thresholder 1.2")
    sys.exit()
image, mask, modality, case_id = sys.argv[1:5]
here = Path(__file__).parent
with (here / "calls.txt").open("a") as stream:
    stream.write(f"{case_id} {modality}\\n")
order = (here / case_id).read_text().split() if (here / case_id).exists() else ["liver"]
if order[0] == "fail":
    print("working", 1, 2, sep="\\r")
    print("no such organ", file=sys.stderr)
    sys.exit(3)
if order[0] == "sleep":
    time.sleep(60)
if order[0] == "nothing":
    sys.exit()
import nibabel as nib, numpy as np
volume = nib.load(image)
ids = np.where(np.asarray(volume.dataobj) > 60, int(order[1]) if order[0] == "id" else 5, 0).astype(np.uint8)
if order[0] == "empty":
    ids[:] = 0
if order[0] == "half":
    ids = ids[:, :, : ids.shape[2] // 2]
nib.save(nib.Nifti1Image(ids, volume.affine), mask)
"""
FAKE_TOTALSEGMENTATOR = """#!{python}
import sys
if "--version" in sys.argv:
    print("2.4.0")
    sys.exit()
import nibabel as nib, numpy as np
arguments = dict(zip(sys.argv[1::2], sys.argv[2::2]))
source, target = sys.argv[sys.argv.index("-i") + 1], sys.argv[sys.argv.index("-o") + 1]
task = sys.argv[sys.argv.index("--task") + 1]
assert "--ml" in sys.argv
names = {{"total": {{1: "spleen", 5: "liver", 18: "small_bowel", 20: "colon", 23: "kidney_cyst_left",
          29: "vertebrae_L3", 51: "heart", 90: "brain", 94: "rib_left_3"}},
         "total_mr": {{5: "liver", 10: "lung_left", 19: "vertebrae", 20: "intervertebral_discs", 22: "heart"}}}}[task]
volume = nib.load(source)
ids = np.zeros(volume.shape, np.uint8)
for line, number in enumerate(names):
    ids[line] = number
if {unknown}:
    names[29], ids[5] = "left_horn", 29
rows = "".join(
    f'<Label Key="{{k}}" Red="1.0" Green="0.0" Blue="0.0" Alpha="1"><![CDATA[{{n}}]]></Label>\\n'
    for k, n in names.items()
)
xml = ('<?xml version="1.0" encoding="UTF-8"?> <CaretExtension>  <Date><![CDATA[2013-07-14T05:45:09]]></Date>   '
       f'<VolumeInformation Index="0">   <LabelTable>\\n{{rows}}\\n  </LabelTable>  <StudyMetaDataLinkSet>  '
       '</StudyMetaDataLinkSet>  </VolumeInformation></CaretExtension>\\n              ')
made = nib.Nifti1Image(ids, volume.affine)
if {named}:
    made.header.extensions.append(nib.nifti1.Nifti1Extension(0, xml.encode()))
nib.save(made, target)
"""


class Tool:
    """The thresholding program in a folder of its own, and its settings for single cases."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder = folder
        (folder / "tool.py").write_text(TOOL)
        program = f"{shlex.quote(sys.executable)} {shlex.quote(str(folder / 'tool.py'))}"
        self.config = AnnotateConfig(
            tool="command",
            command=f"{program} {{image}} {{mask}} {{modality}} {{case_id}}",
            version_command=f"{program} --version",
            modalities=("CT",),
        )

    def order(self, case_id: str, words: str | None) -> None:
        if words is None:
            (self.folder / case_id).unlink()
        else:
            (self.folder / case_id).write_text(words)

    def calls(self) -> list[str]:
        """Cases it was run on since the last time it was asked."""
        file = self.folder / "calls.txt"
        lines = sorted(file.read_text().splitlines()) if file.exists() else []
        file.unlink(missing_ok=True)
        return lines
