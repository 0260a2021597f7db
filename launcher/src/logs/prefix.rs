//! The prefix of each line of a rank.

/// Values of the names that a template may contain.
#[derive(Debug, Clone)]
pub(crate) struct Names<'a> {
    pub(crate) role_name: &'a str,
    pub(crate) rank: u32,
    pub(crate) local_rank: u32,
    pub(crate) node_rank: u32,
    pub(crate) host: &'a str,
    pub(crate) run_id: &'a str,
}

/// Names that a template may contain. `host` is older than torchrun's `hostname`.
const NAMES: [&str; 7] = ["role_name", "rank", "local_rank", "node_rank", "hostname", "host", "run_id"];
/// Codes of colours that are readable on light and on dark backgrounds.
const COLOURS: [u8; 6] = [36, 32, 33, 35, 34, 31];

/// A part of a template, in the grammar of Python's `string.Template`, which torchrun uses.
enum Part<'a> {
    Text(&'a str),
    /// `${name}`.
    Braced(&'a str),
    /// `$name`, which remains text if the name is unknown.
    Bare(&'a str),
    /// `${` without its `}`.
    Open(&'a str),
}

fn parts(template: &str) -> Vec<Part<'_>> {
    let (mut parts, mut rest) = (Vec::new(), template);
    while let Some(at) = rest.find('$') {
        let (before, after) = (&rest[..at], &rest[at + 1..]);
        parts.push(Part::Text(before));
        let is_name = |letter: char| letter.is_ascii_alphanumeric() || letter == '_';
        if let Some(left) = after.strip_prefix('$') {
            parts.push(Part::Text("$"));
            rest = left;
        } else if let Some(inner) = after.strip_prefix('{') {
            match inner.split_once('}') {
                Some((name, left)) => {
                    parts.push(Part::Braced(name));
                    rest = left;
                }
                None => {
                    parts.push(Part::Open(&rest[at..]));
                    return parts;
                }
            }
        } else {
            let end = after.find(|letter| !is_name(letter)).unwrap_or(after.len());
            parts.push(Part::Bare(&after[..end]));
            rest = &after[end..];
        }
    }
    parts.push(Part::Text(rest));
    parts
}

/// Checks that a template contains only known names.
///
/// # Errors
/// Returns a message about an unknown name or a missing `}`.
pub(crate) fn check_template(template: &str) -> Result<(), String> {
    let names = || NAMES.map(|name| format!("${{{name}}}")).join(", ");
    for part in parts(template) {
        match part {
            Part::Braced(name) if !NAMES.contains(&name) => {
                return Err(format!("`${{{name}}}` is not one of {}", names()));
            }
            Part::Open(text) => return Err(format!("`{text}` lacks its `}}`: expected one of {}", names())),
            _ => {}
        }
    }
    Ok(())
}

/// Replaces the names in a template. Unknown names stay as they are, like in torchrun.
pub(crate) fn prefix(template: &str, names: &Names) -> String {
    let value = |name: &str| match name {
        "role_name" => Some(names.role_name.to_owned()),
        "rank" => Some(names.rank.to_string()),
        "local_rank" => Some(names.local_rank.to_string()),
        "node_rank" => Some(names.node_rank.to_string()),
        "hostname" | "host" => Some(names.host.to_owned()),
        "run_id" => Some(names.run_id.to_owned()),
        _ => None,
    };
    let text = |part| match part {
        Part::Text(text) | Part::Open(text) => text.to_owned(),
        Part::Braced(name) => value(name).unwrap_or_else(|| format!("${{{name}}}")),
        Part::Bare(name) => value(name).unwrap_or_else(|| format!("${name}")),
    };
    parts(template).into_iter().map(text).collect()
}

/// Returns the prefix in the colour of its rank.
pub(crate) fn coloured(prefix: &str, local_rank: u32) -> String {
    if prefix.is_empty() {
        return String::new();
    }
    let colour = COLOURS[local_rank as usize % COLOURS.len()];
    format!("\x1b[{colour}m{prefix}\x1b[0m")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_put_in() {
        let names =
            Names { role_name: "trainer", rank: 9, local_rank: 1, node_rank: 2, host: "gpu-7", run_id: "r" };
        for (template, expected) in [
            ("[${role_name}${rank}]:", "[trainer9]:"),
            ("${hostname}:${rank}: ", "gpu-7:9: "),
            ("${host}/${local_rank} ${node_rank} ${run_id} ${what} ", "gpu-7/1 2 r ${what} "),
            // Like Python's `string.Template`.
            ("$rank-$local_rank $$rank $ 5$ $what", "9-1 $rank $ 5$ $what"),
            ("${rank", "${rank"),
            ("", ""),
        ] {
            assert_eq!(prefix(template, &names), expected, "{template}");
        }
        assert_eq!(coloured("[a]", 7), "\x1b[32m[a]\x1b[0m");
    }

    #[test]
    fn value_is_not_substituted_again() {
        let names =
            Names { role_name: "${rank}", rank: 9, local_rank: 1, node_rank: 2, host: "h", run_id: "r" };
        assert_eq!(prefix("${role_name}", &names), "${rank}");
    }

    #[test]
    fn unknown_names_are_errors() {
        assert_eq!(check_template("[${role_name}${rank}]: $5 $$"), Ok(()));
        assert!(check_template("${nonsense}").unwrap_err().contains("`${nonsense}` is not one of"));
        assert!(check_template("a ${rank").unwrap_err().contains("`${rank` lacks"));
    }
}
