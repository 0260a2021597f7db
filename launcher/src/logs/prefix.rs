//! What stands before each line of a rank.

/// What a template may name.
#[derive(Debug, Clone)]
pub(crate) struct Names<'a> {
    pub(crate) role_name: &'a str,
    pub(crate) rank: u32,
    pub(crate) local_rank: u32,
    pub(crate) node_rank: u32,
    pub(crate) host: &'a str,
    pub(crate) run_id: &'a str,
}

/// Codes of colours that are read well on light and on dark ground.
const COLOURS: [u8; 6] = [36, 32, 33, 35, 34, 31];

/// Puts the names in. What is not a name is left as it is, as torchrun does.
pub(crate) fn prefix(template: &str, names: &Names) -> String {
    [
        ("${role_name}", names.role_name),
        ("${rank}", &names.rank.to_string()),
        ("${local_rank}", &names.local_rank.to_string()),
        ("${node_rank}", &names.node_rank.to_string()),
        ("${host}", names.host),
        ("${run_id}", names.run_id),
    ]
    .iter()
    .fold(template.to_owned(), |text, (name, value)| text.replace(name, value))
}

/// The prefix in the colour of its rank.
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
        assert_eq!(prefix("[${role_name}${rank}]:", &names), "[trainer9]:");
        assert_eq!(
            prefix("${host}/${local_rank} ${node_rank} ${run_id} ${what} ", &names),
            "gpu-7/1 2 r ${what} "
        );
        assert_eq!(coloured("[a]", 7), "\x1b[32m[a]\x1b[0m");
    }
}
