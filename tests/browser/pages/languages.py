"""The page in other languages."""

from __future__ import annotations

from playwright.sync_api import Page

TABS = {
    "en-US": ["Generate", "Edit", "Multi-reference", "Explore", "History", "Inspect", "Models"],
    "zh-CN": ["生成", "编辑", "多图参考", "探索", "历史", "检查", "模型"],
    "de-DE": ["Erzeugen", "Bearbeiten", "Multi-Referenz", "Erkunden", "Verlauf", "Prüfen", "Modelle"],
    "ja-JP": ["生成", "編集", "複数参照", "探索", "履歴", "検査", "モデル"],
}

# Of a page in each: the prompt's label and placeholder, the run button, what stands where the picture will be, how many
# pictures there are when one is done, and what steps are called.
WORDS = {
    "zh-CN": ("提示词", "图片要表现什么？", "生成", "图片将显示在这里。", "1 张图片，用时", "步数"),  # noqa: RUF001
    "de-DE": ("Prompt", "Was soll das Bild zeigen?", "Erzeugen", "Hier erscheint das Bild.", "1 Bild in", "Schritte"),
    "ja-JP": ("プロンプト", "どんな画像にしますか？", "生成", "ここに画像が表示されます。", "1 枚、", "ステップ数"),  # noqa: RUF001
}


def tabs(page: Page) -> list[str]:
    return [tab.inner_text() for tab in page.get_by_role("tab").all()]


def expect_nothing_cut_or_left_as_a_mark(page: Page) -> None:
    page.wait_for_timeout(1000)  # whatever is sent when the page is opened
    rows = page.get_by_role("tab").evaluate_all("(them) => new Set(them.map((it) => it.offsetTop)).size")
    assert rows == 1
    for number in range(page.get_by_role("tab").count()):
        page.get_by_role("tab").nth(number).click()
        page.wait_for_timeout(400)
        seen = page.locator("body").inner_text()
        assert "__i18n__" not in seen and "flux2-studio: " not in seen
        for width in (390, 1440):
            page.set_viewport_size({"width": width, "height": 900})
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
            cut = page.evaluate(
                """() => [...document.querySelectorAll('button:not(.label-wrap), label, h3, .chip')]
                    .filter((it) => it.offsetParent && it.scrollWidth > it.clientWidth + 2 && it.clientWidth)
                    .map((it) => it.textContent)"""
            )
            assert not cut
    page.get_by_role("tab").first.click()
