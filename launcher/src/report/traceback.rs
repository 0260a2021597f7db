//! Finds the exception in a Python traceback.

/// The line above the frames.
const HEADER: &str = "Traceback (most recent call last):";
/// Text before the header of an exception group, and before the lines of the group itself.
const GROUP: &str = "  + Exception Group ";
const IN_GROUP: &str = "  | ";
/// Text that a data loader puts before the traceback of its worker.
const ORIGINAL: &str = "Original ";

/// Returns type and text of the exception that ended a program, if the last lines of its stderr
/// have a traceback. Of chained exceptions, that is the last one; of an exception group, the group.
/// Notes are left out.
pub(crate) fn exception(lines: &[String]) -> Option<String> {
    let after_header = lines.iter().enumerate().rev().find_map(|(at, line)| {
        let before = &line[..line.find(HEADER)?];
        // PyTorch puts the rank before each line. The exceptions of a group are indented.
        let (prefix, bar) = match before.strip_suffix(GROUP) {
            Some(prefix) => (prefix, IN_GROUP),
            None => (before.strip_suffix(ORIGINAL).unwrap_or(before), ""),
        };
        let is_inner = prefix.contains('|') || prefix.starts_with(char::is_whitespace);
        let found = || after_frames(&lines[at + 1..], &format!("{prefix}{bar}"));
        if is_inner { None } else { found().map(|(length, text)| (at + length, text)) }
    });
    // The header may be above the lines that were kept, and a syntax error has none.
    let after_frame = lines.iter().rposition(|line| line.starts_with("  File \"")).and_then(|at| {
        let (length, text) = after_frames(&lines[at..], "")?;
        Some((at + length, text))
    });
    after_header.max(after_frame).map(|(_, text)| text)
}

/// Returns the first line that is not indented, and its position from 1.
fn after_frames(lines: &[String], prefix: &str) -> Option<(usize, String)> {
    let stripped = |line: &str| line.strip_prefix(prefix).unwrap_or(line).to_owned();
    let at = lines.iter().position(|line| {
        let line = stripped(line);
        !line.starts_with([' ', '\t']) && !line.trim().is_empty()
    })?;
    let line = stripped(&lines[at]).trim_end().to_owned();
    let name = line.split(':').next().unwrap_or_default();
    let is_name = name.starts_with(|c: char| c.is_alphabetic() || c == '_')
        && name.chars().all(|c| c.is_alphanumeric() || c == '_' || c == '.');
    if !is_name {
        return None;
    }
    // Some messages begin in the next line.
    let more = lines.get(at + 1).filter(|_| line.ends_with(':')).map(|next| stripped(next));
    let more = more.map(|next| format!(" {}", next.trim())).unwrap_or_default();
    Some((at + 1, line + &more))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(text: &str) -> Option<String> {
        let lines: Vec<String> = text.lines().map(ToOwned::to_owned).collect();
        exception(&lines)
    }

    #[track_caller]
    fn is(text: &str, wanted: &str) {
        assert_eq!(of(text).as_deref(), Some(wanted), "{text}");
    }

    const FRAMES: &str = "Traceback (most recent call last):\n  File \"train.py\", line 3, in <module>\n    main()\n    ~~~~^^\n";

    #[test]
    fn it_is_the_line_after_the_frames() {
        is(&format!("some output\n{FRAMES}ValueError: no such colour\n"), "ValueError: no such colour");
        is(&format!("{FRAMES}KeyboardInterrupt\nbye: done\n"), "KeyboardInterrupt");
        is(
            &format!("{FRAMES}torch.OutOfMemoryError: CUDA out of memory.\na note\n"),
            "torch.OutOfMemoryError: CUDA out of memory.",
        );
        is(
            &format!("{FRAMES}RuntimeError: Error(s) in loading state_dict for Net:\n\tsize mismatch\n"),
            "RuntimeError: Error(s) in loading state_dict for Net: size mismatch",
        );
    }

    #[test]
    fn the_last_of_chained_exceptions_is_taken() {
        let during = "\nDuring handling of the above exception, another exception occurred:\n\n";
        is(&format!("{FRAMES}KeyError: 'a'\n{during}{FRAMES}ValueError: b\n"), "ValueError: b");
    }

    #[test]
    fn a_group_is_taken_and_not_one_of_its_exceptions() {
        let text = "  + Exception Group Traceback (most recent call last):
  |   File \"train.py\", line 1, in <module>
  |     raise ExceptionGroup(\"several\", errors)
  | ExceptionGroup: several (2 sub-exceptions)
  +-+---------------- 1 ----------------
    | Traceback (most recent call last):
    |   File \"train.py\", line 7, in load
    |     raise ValueError(\"a\")
    | ValueError: a
    +---------------- 2 ----------------
    | TypeError: b
    +------------------------------------
";
        is(text, "ExceptionGroup: several (2 sub-exceptions)");
    }

    #[test]
    fn the_prefix_of_pytorch_is_left_out() {
        let text = "[rank1]: Traceback (most recent call last):\n[rank1]:   File \"a.py\", line 1, in f\n[rank1]:     g()\n[rank1]: ValueError: x\n";
        is(text, "ValueError: x");
    }

    #[test]
    fn the_worker_of_a_data_loader_has_the_reason() {
        let text = format!(
            "{FRAMES}ValueError: Caught ValueError in DataLoader worker process 0.\nOriginal {FRAMES}ValueError: bad sample\n"
        );
        is(&text, "ValueError: bad sample");
    }

    #[test]
    fn a_header_is_not_needed() {
        is(
            "  File \"a.py\", line 1\n    foo(\n       ^\nSyntaxError: '(' was never closed\n",
            "SyntaxError: '(' was never closed",
        );
        is("    deep()\n  File \"a.py\", line 9, in deep\n    raise E\nmod.E: far down\n", "mod.E: far down");
    }

    #[test]
    fn other_output_is_no_exception() {
        assert_eq!(of("loading\nfailed: no such file\n"), None);
        assert_eq!(of(&format!("{FRAMES}ends here?\n")), None);
        assert_eq!(of(FRAMES), None);
    }
}
