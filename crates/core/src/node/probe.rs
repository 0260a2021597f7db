use std::io::Write;
use std::num::NonZeroU64;

use tch::Tensor;

use crate::{Context, Node, Outputs, Result, Value};

/// Prints outputs of other nodes as `E{epochs}S{steps}: name = …`, with the numbers of completed
/// training epochs and steps. Tensors are printed with their type and shape. An output that cannot
/// be formatted is printed as its type.
///
/// Added by [`HyperGraph::print_forward_output`](crate::HyperGraph::print_forward_output).
pub struct Probe {
    names: Vec<String>,
    every: u64,
    left: u64,
    train_only: bool,
    main_only: bool,
    seen: u64,
    out: Box<dyn Write>,
}

impl Probe {
    /// Prints the outputs of these nodes at every step, on rank 0.
    pub fn of<N: Into<String>>(names: impl IntoIterator<Item = N>) -> Self {
        Self {
            names: names.into_iter().map(Into::into).collect(),
            every: 1,
            left: u64::MAX,
            train_only: false,
            main_only: true,
            seen: 0,
            out: Box::new(std::io::stdout()),
        }
    }

    /// Prints only at every `passes`-th pass, starting with the first.
    #[must_use]
    pub fn every(mut self, passes: NonZeroU64) -> Self {
        self.every = passes.get();
        self
    }

    /// Prints at most this many times.
    #[must_use]
    pub fn total(mut self, times: u64) -> Self {
        self.left = times;
        self
    }

    /// Prints only in training.
    #[must_use]
    pub fn train_only(mut self) -> Self {
        self.train_only = true;
        self
    }

    /// Prints on every rank.
    #[must_use]
    pub fn on_all_ranks(mut self) -> Self {
        self.main_only = false;
        self
    }

    /// Prints to `out` instead of the standard output.
    #[must_use]
    pub fn to(mut self, out: impl Write + 'static) -> Self {
        self.out = Box::new(out);
        self
    }
}

impl Node for Probe {
    fn set_up(&mut self, _: &Context) -> Result<()> {
        Ok(())
    }

    fn forward(&mut self, x: &Outputs) -> Result<Value> {
        let looks = x.is_training() || !self.train_only;
        if looks && self.seen.is_multiple_of(self.every) && self.left > 0 {
            self.left -= 1;
            let (epochs, steps) = (x.place().train_epochs, x.train_steps());
            for name in &self.names {
                // Every rank asks for the output, so that all ranks run the same nodes.
                let output = x.value(name)?;
                if x.worker().is_main() || !self.main_only {
                    let text = output.text();
                    // If the output is closed, no reader misses the line.
                    let _ = writeln!(self.out, "E{epochs}S{steps}: {name} = {text}");
                }
            }
        }
        self.seen += u64::from(looks);
        Ok(Value::new(()))
    }
}

impl Value {
    /// Formats the value for a person to read.
    pub(crate) fn text(&self) -> String {
        macro_rules! first {
            ($($kind:ty),*) => {
                $(if let Ok(value) = self.downcast::<$kind>() {
                    return value.to_string();
                })*
            };
        }
        first!(f64, f32, i64, i32, u64, usize, bool, String);
        let of_tensor = |tensor: &Tensor| format!("{tensor}").trim_end().to_owned();
        if let Ok(tensor) = self.downcast::<Tensor>() {
            if tensor.size().is_empty() {
                return tensor.double_value(&[]).to_string();
            }
            return format!("\n{}", of_tensor(&tensor));
        }
        if let Ok(pair) = self.downcast::<(Tensor, Tensor)>() {
            return format!("(\n{},\n{})", of_tensor(&pair.0), of_tensor(&pair.1));
        }
        format!("a {}", self.type_name())
    }
}
