//! Makes the tables and charts of docs/benchmarks.md from the rows that `scripts/bench` collects.
//!
//! usage: benchmarks ROWS FACTS DOCS
//!
//! ROWS has a line per row, as written by `row` of scripts/lib-bench.sh. FACTS has a name and a
//! value per line, separated by a tab. The text between the two marker lines of DOCS/benchmarks.md
//! is replaced, and a chart per group is written to DOCS/images.

use std::error::Error;
use std::fmt::Write as _;
use std::path::Path;
use std::{env, fs};

use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

const BEGIN: &str = "<!-- measured: scripts/bench writes the rest of the page -->";
const END: &str = "<!-- end of what is measured -->";

/// Measurements of one side of a comparison.
struct Side {
    median: Option<f64>,
    least: f64,
    most: f64,
    runs: u32,
    failed: u32,
}

#[derive(Clone, Copy)]
enum Goal {
    Ratio(f64),
    Ours(f64),
}

struct Row {
    group: String,
    title: String,
    unit: String,
    more_is_better: bool,
    ours: Side,
    peer: Option<(String, Side)>,
    goal: Option<Goal>,
}

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let [rows, facts, docs] = &arguments[..] else { return Err("usage: benchmarks ROWS FACTS DOCS".into()) };
    let docs = Path::new(docs);
    let rows = fs::read_to_string(rows)?.lines().map(parse).collect::<Result<Vec<_>, _>>()?;
    let mut groups: Vec<&str> = Vec::new();
    for row in &rows {
        if !groups.contains(&row.group.as_str()) {
            groups.push(&row.group);
        }
    }
    let mut text = machine(&fs::read_to_string(facts)?);
    fs::create_dir_all(docs.join("images"))?;
    for group in groups {
        let rows: Vec<&Row> = rows.iter().filter(|row| row.group == group).collect();
        write!(text, "\n## {}{}\n\n", group[..1].to_uppercase(), &group[1..])?;
        if rows.iter().any(|row| row.ratio().is_some()) {
            let image = format!("images/bench-{group}.svg");
            draw(&docs.join(&image), &rows)?;
            write!(text, "![How many times better than the peer, {group}]({image})\n\n")?;
        }
        table(&mut text, &rows)?;
    }
    let page = docs.join("benchmarks.md");
    let old = fs::read_to_string(&page)?;
    let (before, rest) =
        old.split_once(BEGIN).ok_or_else(|| format!("{} has no line '{BEGIN}'", page.display()))?;
    let (_, after) = rest.split_once(END).ok_or_else(|| format!("{} has no line '{END}'", page.display()))?;
    fs::write(&page, format!("{before}{BEGIN}\n\n{}\n\n{END}{after}", text.trim()))?;
    Ok(())
}

fn parse(line: &str) -> Result<Row, Box<dyn Error>> {
    let fields: Vec<&str> = line.split('\t').collect();
    let [group, title, unit, better, m, l, h, n, f, peer, pm, pl, ph, pn, pf, goal] = fields[..] else {
        return Err(format!("a row has 16 fields, and this has {}: {line}", fields.len()).into());
    };
    let side =
        |median: &str, least: &str, most: &str, runs: &str, failed: &str| -> Result<Side, Box<dyn Error>> {
            Ok(Side {
                median: median.parse().ok(),
                least: least.parse().unwrap_or_default(),
                most: most.parse().unwrap_or_default(),
                runs: runs.parse()?,
                failed: failed.parse()?,
            })
        };
    let goal = match (goal, goal.strip_suffix('x')) {
        ("-", _) => None,
        (_, Some(ratio)) => Some(Goal::Ratio(ratio.parse()?)),
        (ours, None) => Some(Goal::Ours(ours.parse()?)),
    };
    Ok(Row {
        group: group.into(),
        title: title.into(),
        unit: unit.into(),
        more_is_better: better == "more",
        ours: side(m, l, h, n, f)?,
        peer: (peer != "-")
            .then(|| Ok::<_, Box<dyn Error>>((peer.to_owned(), side(pm, pl, ph, pn, pf)?)))
            .transpose()?,
        goal,
    })
}

impl Row {
    /// Returns our median divided by the peer's.
    fn ratio(&self) -> Option<f64> {
        let theirs = self.peer.as_ref()?.1.median?;
        (theirs > 0.0).then_some(self.ours.median? / theirs)
    }

    /// Returns how many times better our result is. More than 1 is a win, whatever the unit.
    fn advantage(&self) -> Option<f64> {
        let ratio = self.ratio().filter(|ratio| *ratio > 0.0)?;
        Some(if self.more_is_better { ratio } else { 1.0 / ratio })
    }

    fn meets_goal(&self) -> Option<bool> {
        let (number, bound) = match self.goal? {
            Goal::Ratio(bound) => (self.ratio()?, bound),
            Goal::Ours(bound) => (self.ours.median?, bound),
        };
        Some(if self.more_is_better { number >= bound } else { number <= bound })
    }

    /// Returns the text of the last column.
    fn verdict(&self) -> String {
        let mut words = Vec::new();
        if self.advantage().is_some_and(|times| times < 1.0) {
            words.push("**loss**");
        }
        match self.meets_goal() {
            Some(true) => words.push("goal met"),
            Some(false) => words.push("**goal missed**"),
            None => {}
        }
        words.join(", ")
    }
}

fn number(value: f64) -> String {
    match value {
        v if v >= 100.0 => format!("{v:.0}"),
        v if v >= 1.0 => format!("{v:.2}"),
        v => format!("{v:.3}"),
    }
}

fn spread(side: &Side) -> String {
    let mut text = match side.median {
        None => String::from("–"),
        Some(median) if side.runs > 1 => {
            format!("{} ({} to {})", number(median), number(side.least), number(side.most))
        }
        Some(median) => number(median),
    };
    if side.failed > 0 {
        let _ = write!(text, ", failed {} of {}", side.failed, side.failed + side.runs);
    }
    text
}

fn machine(facts: &str) -> String {
    let mut text = String::from("| | |\n|---|---|\n");
    for (name, value) in facts.lines().filter_map(|line| line.split_once('\t')) {
        let _ = writeln!(text, "| {name} | {value} |");
    }
    text
}

fn table(text: &mut String, rows: &[&Row]) -> Result<(), std::fmt::Error> {
    text.push_str("| what | unit | ice | peer | ratio | goal | |\n|---|---|---|---|---|---|---|\n");
    for row in rows {
        let unit =
            if row.more_is_better { format!("{}, more is better", row.unit) } else { row.unit.clone() };
        let peer = row.peer.as_ref().map_or("–".into(), |(name, side)| format!("{name} {}", spread(side)));
        let ratio = row.ratio().map_or("–".into(), |ratio| format!("{ratio:.2}×"));
        let sign = if row.more_is_better { "≥" } else { "≤" };
        let goal = row.goal.map_or(String::new(), |goal| match goal {
            Goal::Ratio(bound) => format!("{sign} {bound}×"),
            Goal::Ours(bound) => format!("{sign} {bound} {}", row.unit),
        });
        writeln!(
            text,
            "| {} | {unit} | {} | {peer} | {ratio} | {goal} | {} |",
            row.title,
            spread(&row.ours),
            row.verdict()
        )?;
    }
    Ok(())
}

const WIDTH: u32 = 900;
const LABELS: u32 = 470;
const BAR: u32 = 26;
const WIN: RGBColor = RGBColor(46, 125, 50);
const LOSS: RGBColor = RGBColor(198, 40, 40);

/// Draws a bar per row that has a peer: how many times better our result is, on a logarithmic axis
/// that starts at the peer's 1.
fn draw(path: &Path, rows: &[&Row]) -> Result<(), Box<dyn Error>> {
    let bars: Vec<(String, f64)> = rows
        .iter()
        .filter_map(|row| {
            let (peer, _) = row.peer.as_ref()?;
            Some((format!("{} / {peer}", row.title), row.advantage()?))
        })
        .collect();
    let least = bars.iter().map(|bar| bar.1).fold(0.5, f64::min);
    let most = bars.iter().map(|bar| bar.1).fold(2.0, f64::max);
    let root = SVGBackend::new(path, (WIDTH, BAR * bars.len() as u32 + 70)).into_drawing_area();
    root.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&root)
        .margin(10)
        .margin_right(50)
        .set_label_area_size(LabelAreaPosition::Left, LABELS)
        .set_label_area_size(LabelAreaPosition::Bottom, 40)
        .build_cartesian_2d((least * 0.8..most * 1.25).log_scale(), 0.0..bars.len() as f64)?;
    chart
        .configure_mesh()
        .disable_y_mesh()
        .disable_y_axis()
        .light_line_style(WHITE)
        .x_label_formatter(&|times| format!("{}×", (times * 1000.0).round() / 1000.0))
        .x_desc("times better than the peer (1× is the peer)")
        .draw()?;
    let small = ("sans-serif", 13).into_font();
    for (index, (label, times)) in bars.iter().enumerate() {
        let top = (bars.len() - index) as f64 - 0.18;
        let color = if *times < 1.0 { LOSS } else { WIN };
        let (from, to) = if *times < 1.0 { (*times, 1.0) } else { (1.0, *times) };
        chart.draw_series([Rectangle::new([(from, top), (to, top - 0.64)], color.filled())])?;
        let (x, y) = chart.backend_coord(&(to, top - 0.32));
        let left = TextStyle::from(small.clone()).pos(Pos::new(HPos::Left, VPos::Center));
        root.draw_text(&format!("{}×", number(*times)), &left, (x + 6, y))?;
        let right = TextStyle::from(small.clone()).pos(Pos::new(HPos::Right, VPos::Center));
        root.draw_text(label, &right, (LABELS as i32, y))?;
    }
    chart.draw_series(LineSeries::new([(1.0, 0.0), (1.0, bars.len() as f64)], BLACK.stroke_width(1)))?;
    root.present()?;
    Ok(())
}
