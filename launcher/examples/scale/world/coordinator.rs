//! The coordinator's thread, which handles one input after another and takes time for each.

use super::*;

impl World {
    pub(super) fn comes(&mut self, input: Input) {
        self.to_accept += usize::from(matches!(input, Input::Accept(_)));
        self.queue.push_back((self.now, input));
        if !self.is_working {
            self.work();
        }
    }

    /// Handles the input that has waited longest.
    pub(super) fn work(&mut self) {
        let Some((since, input)) = self.queue.pop_front() else {
            self.is_working = false;
            return;
        };
        self.trouble.longest_wait = self.trouble.longest_wait.max(self.now - since);
        let took = self.input(input);
        self.busy += took;
        self.is_working = true;
        self.at(self.now + took, What::Works);
    }

    /// Handles an input. Returns the CPU time for it.
    fn input(&mut self, input: Input) -> Duration {
        let costs = self.config.costs;
        match input {
            Input::Accept(peer) => {
                self.to_accept -= 1;
                self.strangers.insert(peer, self.now);
                while let Some((oldest, since)) = self.strangers.first_key_value()
                    && self.strangers.len() > STRANGERS
                    && self.now - *since > GRACE
                {
                    let (oldest, way) = (*oldest, self.config.network.latency);
                    self.strangers.remove(&oldest);
                    self.at(self.now + way, What::TurnedAway(oldest));
                }
                // The cost is counted when the greeting is handled.
                Duration::ZERO
            }
            Input::Greet(peer) => {
                if self.strangers.remove(&peer).is_none() {
                    return Duration::ZERO;
                }
                self.connections[peer as usize].heard = self.now;
                let at = self.now + costs.connect + self.one_way();
                self.at(at, What::Greeted(peer));
                costs.connect
            }
            Input::Said(peer, number) => {
                let Some(message) = self.said[number].take() else { return Duration::ZERO };
                let connection = &mut self.connections[peer as usize];
                if !connection.open {
                    return Duration::ZERO;
                }
                connection.heard = self.now;
                if matches!(message, ToCoordinator::Hello(_)) {
                    let (interval, silence) = keep_alive();
                    self.at(self.now + interval, What::HostAlive(peer));
                    self.at(self.now + silence, What::Silence(peer));
                }
                costs.receive + self.coordinate(costs.receive, Event::Message(peer, message))
            }
            Input::KeepAlive(peer) => {
                self.send(peer, self.now + costs.send, ToAgent::KeepAlive);
                costs.send
            }
            Input::Lost(peer) => {
                let connection = &mut self.connections[peer as usize];
                if !std::mem::take(&mut connection.open) {
                    return Duration::ZERO;
                }
                self.lost = Some(self.now);
                costs.receive + self.coordinate(costs.receive, Event::Lost(peer))
            }
            Input::Tick => {
                self.tick = None;
                costs.receive + self.coordinate(costs.receive, Event::Tick)
            }
        }
    }

    /// Passes an event to the coordinator. Returns the CPU time for its messages, which are sent
    /// one after another.
    fn coordinate(&mut self, after: Duration, event: Event) -> Duration {
        let mut took = Duration::ZERO;
        for action in self.coordinator.handle(self.now, event) {
            match action {
                Action::Send(peer, message) => {
                    took += self.config.costs.send;
                    self.send(peer, self.now + after + took, message);
                }
                Action::Close(peer) => self.connections[peer as usize].open = false,
                Action::ClearStore => {}
            }
        }
        let deadline = self.coordinator.deadline().map(|deadline| deadline.max(self.now));
        if let Some(at) = deadline.filter(|at| self.tick.is_none_or(|tick| *at < tick)) {
            self.tick = Some(at);
            self.at(at, What::Comes(Input::Tick));
        }
        took
    }

    fn send(&mut self, peer: Peer, ready: Duration, message: ToAgent) {
        let through = self.outgoing.pass(ready, frame_len(&message), self.config.network.bandwidth);
        let comes = through + self.one_way();
        let connection = &mut self.connections[peer as usize];
        connection.host_said = ready;
        connection.to_agent = connection.to_agent.max(comes);
        let comes = connection.to_agent;
        self.heard.push(Some(message));
        self.at(comes, What::Heard(peer, self.heard.len() - 1));
    }
}
