//! A line at the bottom of a terminal, below all other output, that is rewritten in place.

/// Moves the cursor to the beginning of the line and empties the line.
const ERASE: &str = "\r\x1b[K";
/// Number of columns that is assumed if the terminal does not know its width.
const USUAL_WIDTH: usize = 80;

/// The line, and the known state of the cursor. This type writes nothing itself; its methods return
/// the bytes to write.
#[derive(Debug)]
pub(super) struct StatusLine {
    text: String,
    /// Whether the line is on the screen.
    shown: bool,
    /// Whether the cursor would be at the beginning of a line if the status line were not shown.
    at_start: bool,
}

impl StatusLine {
    pub(super) fn new() -> Self {
        Self { text: String::new(), shown: false, at_start: true }
    }

    /// Hides the line before other output.
    pub(super) fn hide(&mut self) -> &'static str {
        if std::mem::take(&mut self.shown) { ERASE } else { "" }
    }

    /// Shows the line again after other output, unless that output ended in the middle of a line.
    pub(super) fn wrote(&mut self, bytes: &[u8], columns: usize) -> String {
        if let Some(last) = bytes.last() {
            self.at_start = *last == b'\n';
        }
        self.draw(columns)
    }

    /// Sets the text. An empty text removes the line.
    pub(super) fn set(&mut self, text: String, columns: usize) -> String {
        self.text = text;
        if self.text.is_empty() { self.hide().into() } else { self.draw(columns) }
    }

    fn draw(&mut self, columns: usize) -> String {
        if self.text.is_empty() || !self.at_start {
            return String::new();
        }
        self.shown = true;
        // A line that fills the last column may be wrapped, and would not be erased completely.
        let most = if columns == 0 { USUAL_WIDTH } else { columns } - 1;
        format!("\r{}\x1b[K", self.text.chars().take(most).collect::<String>())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const COLUMNS: usize = 20;

    /// A terminal that understands the sequences that this module uses.
    #[derive(Default)]
    struct Screen {
        lines: Vec<String>,
        column: usize,
    }

    impl Screen {
        fn show(&mut self, text: &str) {
            if self.lines.is_empty() {
                self.lines.push(String::new());
            }
            let mut rest = text;
            while let Some(c) = rest.chars().next() {
                let line = self.lines.last_mut().unwrap();
                if let Some(after) = rest.strip_prefix("\x1b[K") {
                    line.truncate(self.column);
                    rest = after;
                    continue;
                }
                match c {
                    '\r' => self.column = 0,
                    '\n' => {
                        self.lines.push(String::new());
                        self.column = 0;
                    }
                    c => {
                        let end = (self.column + 1).min(line.len());
                        line.replace_range(self.column.min(end)..end, &c.to_string());
                        self.column += 1;
                        assert!(self.column < COLUMNS, "{line:?} is wrapped");
                    }
                }
                rest = &rest[c.len_utf8()..];
            }
        }
    }

    struct Terminal(StatusLine, Screen);

    impl Terminal {
        fn new() -> Self {
            Self(StatusLine::new(), Screen::default())
        }

        fn output(&mut self, text: &str) {
            self.1.show(self.0.hide());
            self.1.show(text);
            self.1.show(&self.0.wrote(text.as_bytes(), COLUMNS));
        }

        fn status(&mut self, text: &str) {
            self.1.show(&self.0.set(text.into(), COLUMNS));
        }

        #[track_caller]
        fn expect(&self, lines: &[&str]) {
            assert_eq!(self.1.lines, lines);
        }
    }

    #[test]
    fn it_is_rewritten_in_place_and_stays_below_all_else() {
        let mut terminal = Terminal::new();
        terminal.status("step 10");
        terminal.status("step 9");
        terminal.expect(&["step 9"]);
        terminal.output("a\nb\n");
        terminal.expect(&["a", "b", "step 9"]);
        terminal.status("");
        terminal.output("c\n");
        terminal.expect(&["a", "b", "c", ""]);
    }

    #[test]
    fn it_does_not_come_into_a_line_that_has_no_end_yet() {
        let mut terminal = Terminal::new();
        terminal.status("step 1");
        terminal.output("10 %");
        terminal.status("step 2");
        terminal.expect(&["10 %"]);
        terminal.output("\r90 %\r");
        terminal.expect(&["90 %"]);
        terminal.output("done\n");
        terminal.expect(&["done", "step 2"]);
    }

    #[test]
    fn it_is_no_wider_than_the_terminal() {
        let mut terminal = Terminal::new();
        terminal.status("a status of more than twenty columns");
        terminal.expect(&["a status of more th"]);
    }
}
