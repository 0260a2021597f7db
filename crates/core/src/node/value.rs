use std::any::{Any, type_name};
use std::rc::Rc;

/// The output of a node, of any type.
#[derive(Clone)]
pub struct Value {
    value: Rc<dyn Any>,
    type_name: &'static str,
}

impl Value {
    /// Wraps an output.
    pub fn new<T: 'static>(value: T) -> Self {
        Self { value: Rc::new(value), type_name: type_name::<T>() }
    }

    pub(crate) fn type_name(&self) -> &'static str {
        self.type_name
    }

    pub(crate) fn downcast<T: 'static>(&self) -> Result<Rc<T>, &'static str> {
        Rc::clone(&self.value).downcast::<T>().map_err(|_| self.type_name)
    }
}
