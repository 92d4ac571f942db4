# SPDX-License-Identifier: Apache-2.0
"""Opens an HTML file in Chromium, as Qt brings it (pip install pyside6-webengine), and prints what a script finds.

python browser.py FILE SCRIPT: the value of SCRIPT, as JSON, two seconds after the page was loaded.
"""

from __future__ import annotations

import json
import sys

from PySide6.QtCore import QTimer, QUrl
from PySide6.QtWebEngineCore import QWebEnginePage, QWebEngineSettings
from PySide6.QtWidgets import QApplication


def main() -> None:
    path, script = sys.argv[1:]
    application = QApplication([sys.argv[0], "--no-sandbox"])
    page = QWebEnginePage()
    page.settings().setAttribute(QWebEngineSettings.WebAttribute.LocalContentCanAccessFileUrls, True)

    def answer(value: str) -> None:
        print(value, flush=True)
        application.quit()

    def look(loaded: bool) -> None:
        assert loaded
        QTimer.singleShot(2000, lambda: page.runJavaScript(f"JSON.stringify({script})", 0, answer))

    page.loadFinished.connect(look)
    page.load(QUrl.fromLocalFile(path))
    QTimer.singleShot(60_000, lambda: (print(json.dumps("no answer")), application.quit()))
    application.exec()


if __name__ == "__main__":
    main()
