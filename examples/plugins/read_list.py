"""Reads lists with a line per image or video: a path, a tab and a caption. Lines that begin with # are comments.

univitar-ds data pack pets.lst data/pets --plugin examples/plugins/read_list.py
univitar-ds train --config photos 'plugins=[examples/plugins/read_list.py]' data.sources.0.path=pets.lst
"""

from univitar_ds.plugins import register_reader


@register_reader("list", suffix=".lst")
def rows(source, options):
    with open(source, encoding="utf-8") as lines:
        for line in lines:
            path, _, caption = line.rstrip("\n").partition("\t")
            if path and not path.startswith("#"):
                yield {"file": path, "caption": caption, "split": options.split}
