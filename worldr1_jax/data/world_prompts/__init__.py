"""The text-only dataset of World-R1's kind, written for this project (see README.md here).

material/     scene nuclei and clauses on layout
material.py   reads them, strictly
phrasing.py   English: participles, articles
compose.py    one scene -> one short and one long prompt
generate.py   all splits from a seed; `prompt_sets()` is what training reads
measure.py    repeated sequences, near-duplicates, vocabulary
checksums.py  a version's text stays as it was published
builder.py    the tensorflow-datasets builder; needs the extra [tfds]
"""
