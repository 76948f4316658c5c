"""Arranges items on a page: images and their tokens as colours, texts beside them, a title and a legend above."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw
from torch import Tensor

from univitar_ds.viz.fonts import box, clean, draw_text, line_height, missing, right_to_left, text_width, wrap
from univitar_ds.viz.sheet import spread_frames, to_size

Rgb = tuple[int, int, int]

WIDTH, MIN_WIDTH, MOST_REST = 1340, 640, 0.45
"""Maximum width of a page and minimum width of its cards in pixels; largest empty share of the
last row that is filled by wider cards."""
GAP, PADDING, BETWEEN = 12, 10, 2
"""Pixels between cards, within the edge of a card, and between the images of a card."""
TITLE_PX, TEXT_PX, NOTE_PX = 19, 13, 11
"""Font sizes."""
IMAGE, FRAME = (150, 190), (116, 124)
"""Height and maximum width of an image, and of a frame of a video, in pixels."""
NOTE_WIDTH = 112
"""Minimum width in pixels for the text with the sizes below an image."""
THUMBNAIL = (80, 90)
"""Maximum height and width in pixels of a thumbnail of an image, or of each frame in one of a video."""
SHOWN_FRAMES = 3
TEXT_WIDTH, MARK = (150, 240), 17
"""Minimum and wanted width of the texts of a card, and width of a mark and its space, in pixels."""
PAPER, CARD, INK, FAINT = (238, 240, 243), (255, 255, 255), (28, 28, 30), (96, 98, 104)
EDGE = (206, 209, 214)
RIGHT, WRONG = (0, 90, 181), (200, 70, 10)
"""Blue and orange, which remain different with all kinds of colour blindness."""
MEANING = (
    "Colours: the first three principal components of the encoder's output tokens as red, green and blue. All items of "
    "this sheet share them, so similar colours are similar features."
)
ITEMS = {
    "image": "the encoder's input and its tokens; sizes are height x width",
    "video": "frames of the encoder's input, and below them the tokens of these moments; sizes are height x width, of "
    "tokens time x height x width",
}
"""What a card of a modality shows, for the legend."""
BLANK = 255
"""Grey value of the patches whose tokens were dropped."""


@dataclass(frozen=True)
class Line:
    """A text of a card. `right` draws a check mark (True) or a cross (False) before it, `value` a number.

    A text that `wraps` takes the width that the other texts of its card need.
    """

    text: str
    lines: int = 1
    bold: bool = False
    faint: bool = False
    wraps: bool = False
    right: bool | None = None
    value: str = ""


@dataclass(frozen=True)
class Card:
    """An item of a page: rows of images of the same height in each row, a note below them ("" for none), and texts."""

    rows: list[list[Image.Image]]
    note: str
    lines: list[Line]

    @property
    def images_size(self) -> tuple[int, int]:
        """Width and height of the images and their note in pixels."""
        width = max(NOTE_WIDTH, *(sum(part.width for part in row) + BETWEEN * (len(row) - 1) for row in self.rows))
        notes = len(_note_lines(self.note, width)) * line_height(NOTE_PX) if self.note else 0
        return width, sum(row[0].height + BETWEEN for row in self.rows) + notes

    @property
    def text_width(self) -> int:
        """Width in pixels that the texts need, within the bounds of `TEXT_WIDTH`."""
        needed = [
            indent + text_width(clean(line.text), TEXT_PX, bold=line.bold)
            for line, indent in zip(self.lines, _indents(self.lines), strict=True)
            if not line.wraps
        ]
        return min(max([TEXT_WIDTH[0], *(math.ceil(width) for width in needed)]), TEXT_WIDTH[1])


def item_card(frames: Tensor, colours: Tensor, lines: list[Line]) -> Card:
    """Makes the card of an item: an image beside its tokens, or frames of a video above the tokens of these moments.

    Args: frames: (frames, h*14, w*14, 3) uint8, the encoder's input. colours: (t, h, w, 3) uint8, the colours of its
        tokens in raster order.
    """
    t, h, w, _ = colours.shape
    height, width = frames.shape[1:3]
    if len(frames) == 1:
        rows = [[to_size(frames[0], *IMAGE), to_size(colours[0], *IMAGE)]]
        return Card(rows, f"{height} x {width} px | {h} x {w} tokens", lines)
    chosen = spread_frames(len(frames), SHOWN_FRAMES)
    rows = [
        [to_size(frames[frame], *FRAME) for frame in chosen],
        [to_size(colours[frame * t // len(frames)], *FRAME) for frame in chosen],
    ]
    numbers = ", ".join(str(frame + 1) for frame in chosen)
    note = f"frames {numbers} of {len(frames)} | {height} x {width} px | {t} x {h} x {w} tokens"
    return Card(rows, note, lines)


def thumbnail(frames: Tensor) -> Image.Image:
    """Makes a small image of an item; frames of a video are below each other. Args: frames: (frames, h, w, 3) uint8."""
    parts = [to_size(frames[frame], *THUMBNAIL) for frame in spread_frames(len(frames), SHOWN_FRAMES)]
    height = sum(part.height for part in parts) + BETWEEN * (len(parts) - 1)
    image = Image.new("RGB", (max(part.width for part in parts), height), CARD)
    top = 0
    for part in parts:
        image.paste(part, (0, top))
        top += part.height + BETWEEN
    return image


@dataclass(frozen=True)
class Hit:
    """An item that was found, whether it is correct, and its similarity as a text."""

    thumbnail: Image.Image
    right: bool
    value: str


def hits_card(hits: Sequence[Hit], lines: list[Line]) -> Card:
    """Makes the card of a text: the items that were found for it, each above its mark and its value."""
    tallest = max(hit.thumbnail.height for hit in hits)
    row = []
    for hit in hits:
        width = max(hit.thumbnail.width, MARK + math.ceil(text_width(hit.value, NOTE_PX)))
        image = Image.new("RGB", (width + GAP - BETWEEN, tallest + BETWEEN + line_height(TEXT_PX)), CARD)
        image.paste(hit.thumbnail, (0, tallest - hit.thumbnail.height))
        pen = ImageDraw.Draw(image)
        draw_mark(pen, (0, tallest + BETWEEN + 3), hit.right)
        draw_text(pen, (MARK, tallest + BETWEEN + 1), hit.value, NOTE_PX, INK)
        row.append(image)
    return Card([row], "", lines)


def draw_page(title: str, details: Sequence[Line], cards: Sequence[Card], shares: Sequence[float] = ()) -> Image.Image:
    """Draws a page: a title, details and the legend, and below them the cards in rows.

    Args: details: texts and legend below the title. shares: share of the variance of each of the three components that
        the colours of tokens show, between 0 and 1; without any, the legend does not explain colours.
    """
    rows = _rows(cards)
    inner = max([MIN_WIDTH, *(sum(width + GAP for _, width in row) - GAP for row in rows)])
    bodies = [[_draw_card(card, width) for card, width in row] for row in rows]
    heights = [max(body.height for body in row) for row in bodies]
    absent = missing(line.text for lines in (details, *(card.lines for card in cards)) for line in lines)
    head = _draw_head(title, [*details, *_absent_note(absent)], shares, inner)
    page = Image.new("RGB", (inner + 2 * GAP, GAP + head.height + sum(heights) + GAP * len(rows) + GAP), PAPER)
    page.paste(head, (GAP, GAP))
    pen, top = ImageDraw.Draw(page), GAP + head.height + GAP
    for row, height in zip(bodies, heights, strict=True):
        left = GAP
        for body in row:
            corners = (left, top, left + body.width - 1, top + height - 1)
            pen.rectangle(corners, fill=CARD)
            page.paste(body, (left, top))
            pen.rectangle(corners, outline=EDGE)
            left += body.width + GAP
        top += height + GAP
    return page


def _rows(cards: Sequence[Card]) -> list[list[tuple[Card, int]]]:
    """Arranges the cards in rows, like words in lines. Returns each card with its width.

    The page is as narrow as the number of rows permits, so that rows are about equally full. The cards of a row are
    widened to fill it.
    """
    widths = [card.images_size[0] + card.text_width + 3 * PADDING for card in cards]
    inner = WIDTH - 2 * GAP
    count = len(_broken(widths, inner))
    narrow = range(max([MIN_WIDTH, *widths]), inner, 10)
    inner = next((width for width in narrow if len(_broken(widths, width)) == count), inner)
    rows: list[list[tuple[Card, int]]] = []
    for row in _broken(widths, inner):
        rest = inner - sum(widths[index] + GAP for index in row) + GAP
        if len(rows) == count - 1 and rest > MOST_REST * inner:
            rest = 0
        rows.append(
            [
                (cards[index], widths[index] + rest // len(row) + (place < rest % len(row)))
                for place, index in enumerate(row)
            ]
        )
    return rows


def _broken(widths: Sequence[int], inner: int) -> list[list[int]]:
    """Breaks the indices of cards with these widths into rows of `inner` pixels."""
    rows: list[list[int]] = []
    left = inner
    for index, width in enumerate(widths):
        if left + GAP + width > inner:
            rows.append([])
            left = -GAP
        rows[-1].append(index)
        left += GAP + width
    return rows


def _draw_card(card: Card, width: int) -> Image.Image:
    """Draws a card that is `width` pixels wide: images on the left, and texts in the rest of the width."""
    across, down = card.images_size
    left = PADDING + across + PADDING
    texts = _draw_lines(card.lines, width - left - PADDING, CARD)
    body = Image.new("RGB", (width, max(down, texts.height) + 2 * PADDING), CARD)
    top = PADDING
    for row in card.rows:
        x = PADDING
        for part in row:
            body.paste(part, (x, top))
            x += part.width + BETWEEN
        top += row[0].height + BETWEEN
    pen = ImageDraw.Draw(body)
    for number, line in enumerate(_note_lines(card.note, across)):
        draw_text(pen, (PADDING, top + number * line_height(NOTE_PX)), line, NOTE_PX, FAINT)
    body.paste(texts, (left, PADDING))
    return body


def _note_lines(note: str, width: int) -> list[str]:
    """Returns a note in one line if it fits into `width` pixels, else its parts, which `|` separates, in lines."""
    if text_width(note, NOTE_PX) <= width:
        return [note]
    return [line for part in note.split(" | ") for line in wrap(part, width, 3, NOTE_PX)]


def _draw_lines(lines: Sequence[Line], width: int, paper: Rgb) -> Image.Image:
    """Draws texts below each other on an image of `width` pixels."""
    step = line_height(TEXT_PX)
    pieces = [
        (line, indent, wrap(line.text, width - indent, line.lines, TEXT_PX, bold=line.bold))
        for line, indent in zip(lines, _indents(lines), strict=True)
    ]
    image = Image.new("RGB", (width, max(1, sum(step * max(1, len(rows)) + 2 for _, _, rows in pieces))), paper)
    pen, top = ImageDraw.Draw(image), 0
    for line, indent, rows in pieces:
        if line.right is not None:
            draw_mark(pen, (0, top + 3), line.right)
        if line.value:
            draw_text(pen, (indent - 8 - text_width(line.value, TEXT_PX), top), line.value, TEXT_PX, INK)
        widths = [text_width(row, TEXT_PX, bold=line.bold) for row in rows]
        for number, (row, across) in enumerate(zip(rows, widths, strict=True)):
            left = indent + (max(widths) - across if right_to_left(line.text) else 0)
            draw_text(pen, (left, top + number * step), row, TEXT_PX, FAINT if line.faint else INK, bold=line.bold)
        top += step * max(1, len(rows)) + 2
    return image


def _indents(lines: Sequence[Line]) -> list[int]:
    """Returns the pixels before each text, for its mark and its number. All numbers end at the same place."""
    value = max((math.ceil(text_width(line.value, TEXT_PX)) for line in lines), default=0)
    return [(MARK if line.right is not None else 0) + (value + 8 if line.value else 0) for line in lines]


def draw_mark(pen: ImageDraw.ImageDraw, at: tuple[int, int], right: bool) -> None:
    """Draws a blue check mark or an orange cross, 11 pixels high. No font is needed for it."""
    x, y = at
    if right:
        pen.line([(x, y + 6), (x + 4, y + 10), (x + 11, y)], fill=RIGHT, width=3, joint="curve")
    else:
        pen.line([(x + 1, y + 1), (x + 10, y + 10)], fill=WRONG, width=3)
        pen.line([(x + 1, y + 10), (x + 10, y + 1)], fill=WRONG, width=3)


def _absent_note(absent: Sequence[str]) -> list[Line]:
    if not absent:
        return []
    first = ", ".join(f"U+{ord(char):04X}" for char in absent[:3])
    more = f" and {len(absent) - 3} others" if len(absent) > 3 else ""
    return [
        Line(
            f"{box()} is a character for which this machine has no font ({first}{more}). Install one, such as the "
            "system packages fonts-dejavu and fonts-noto-cjk.",
            lines=2,
        )
    ]


def _draw_head(title: str, details: Sequence[Line], shares: Sequence[float], width: int) -> Image.Image:
    """Draws the title, the details and the legend of the colours on an image of `width` pixels."""
    titles = wrap(title, width, 2, TITLE_PX, bold=True)
    texts = _draw_lines([*details, *([Line(MEANING, lines=3)] if shares else [])], width, PAPER)
    bars = _draw_shares(shares, width)
    first = line_height(TITLE_PX) * len(titles) + 4
    head = Image.new("RGB", (width, first + texts.height + bars.height), PAPER)
    pen = ImageDraw.Draw(head)
    for number, line in enumerate(titles):
        draw_text(pen, (0, number * line_height(TITLE_PX)), line, TITLE_PX, INK, bold=True)
    head.paste(texts, (0, first))
    head.paste(bars, (0, first + texts.height))
    return head


def _draw_shares(shares: Sequence[float], width: int) -> Image.Image:
    """Draws the scale of each component with its share of the variance, in as many rows as they need."""
    step, bar, places, left, top = line_height(TEXT_PX), 64, [], 0, 0
    texts = [f"component {number + 1}: {100 * share:.0f} % of the variance" for number, share in enumerate(shares)]
    for text in texts:
        across = bar + 8 + round(text_width(text, TEXT_PX))
        if left and left + across > width:
            left, top = 0, top + step
        places.append((left, top))
        left += across + 24
    image = Image.new("RGB", (width, top + step if texts else 0), PAPER)
    pen = ImageDraw.Draw(image)
    for channel, (text, (left, top)) in enumerate(zip(texts, places, strict=True)):
        for x in range(bar):
            colour = [0, 0, 0]
            colour[channel] = round(255 * x / (bar - 1))
            pen.line([(left + x, top + 3), (left + x, top + 14)], fill=tuple(colour))
        draw_text(pen, (left + bar + 8, top), text, TEXT_PX, INK)
    return image
