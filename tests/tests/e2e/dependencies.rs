//! All dependencies are allowed by deny.toml, which `cargo deny` also reads: licences, bans, and
//! sources of packages.

use std::fs;

use serde::Deserialize;
use serde_json::Value;
use spdx::{Expression, ParseMode};

use crate::support::{cargo, root};

#[derive(Deserialize)]
struct Rules {
    licenses: Licenses,
    bans: Bans,
    sources: Sources,
}

#[derive(Deserialize)]
struct Licenses {
    allow: Vec<String>,
}

#[derive(Deserialize)]
struct Bans {
    deny: Vec<Banned>,
}

#[derive(Deserialize)]
struct Banned {
    name: String,
    reason: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Sources {
    unknown_registry: String,
    unknown_git: String,
}

const REGISTRY: &str = "registry+https://github.com/rust-lang/crates.io-index";

/// Returns the reason why a package is not allowed.
fn objection(package: &Value, rules: &Rules) -> Option<String> {
    if let Some(banned) = rules.bans.deny.iter().find(|banned| package["name"] == *banned.name) {
        return Some(format!("it is banned: {}", banned.reason));
    }
    if !package["source"].is_null() && package["source"] != REGISTRY {
        return Some(format!("it comes from {}", package["source"]));
    }
    let Some(license) = package["license"].as_str() else { return Some("it names no licence".into()) };
    let expression = match Expression::parse_mode(license, ParseMode::LAX) {
        Ok(expression) => expression,
        Err(error) => return Some(format!("its licence `{license}` cannot be understood: {error}")),
    };
    let allowed = expression.evaluate(|wanted| rules.licenses.allow.contains(&wanted.to_string()));
    (!allowed).then(|| format!("its licence `{license}` is not allowed"))
}

fn rules() -> Rules {
    basic_toml::from_str(&fs::read_to_string(root().join("deny.toml")).unwrap()).unwrap()
}

#[test]
fn every_dependency_is_allowed() {
    let rules = rules();
    assert_eq!((&*rules.sources.unknown_registry, &*rules.sources.unknown_git), ("deny", "deny"));
    for manifest in ["Cargo.toml", "fuzz/Cargo.toml"] {
        let arguments =
            ["metadata", "--locked", "--all-features", "--format-version", "1", "--manifest-path", manifest];
        let output = cargo().args(arguments).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let metadata: Value = serde_json::from_slice(&output.stdout).unwrap();
        let packages = metadata["packages"].as_array().unwrap();
        let others = packages.iter().filter(|package| !package["source"].is_null());
        let objections: Vec<String> = others
            .filter_map(|package| {
                Some(format!("{} {}: {}", package["name"], package["version"], objection(package, &rules)?))
            })
            .collect();
        assert!(objections.is_empty(), "{manifest}:\n{}", objections.join("\n"));
    }
}

#[test]
fn what_is_not_allowed_is_found() {
    let package = |name: &str, source: &str, license: Value| serde_json::json!({ "name": name, "source": source, "license": license });
    let rules = rules();
    let of = |package| objection(&package, &rules);
    assert_eq!(of(package("a", REGISTRY, "MIT/Apache-2.0".into())), None);
    assert_eq!(of(package("a", REGISTRY, "(GPL-3.0-only OR MIT) AND Unicode-3.0".into())), None);
    let found = [
        package("openssl-sys", REGISTRY, "MIT".into()),
        package("a", "git+https://example.com/a", "MIT".into()),
        package("a", REGISTRY, "GPL-3.0-only".into()),
        package("a", REGISTRY, "MIT AND GPL-3.0-only".into()),
        package("a", REGISTRY, Value::Null),
    ];
    for package in found {
        assert!(of(package.clone()).is_some(), "{package}");
    }
}
