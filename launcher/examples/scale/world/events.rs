//! Events outside of the coordinator: connections, agents, silence.

use super::*;
use ice_agent::Action;

impl World {
    pub(super) fn happens(&mut self, what: What) {
        let (interval, silence) = keep_alive();
        match what {
            What::Connect { node, tries } => self.asks(node, tries),
            What::Accepted(peer) => {
                // The agent's greeting arrives a round trip after its request for a connection.
                self.at(self.now + ANSWER, What::Impatient(peer));
                let comes = self.now + self.one_way();
                self.at(comes, What::Comes(Input::Greet(peer)));
            }
            What::Impatient(peer) if !self.is_of_node(peer) => self.gives_up(peer),
            What::TurnedAway(peer) => self.gives_up(peer),
            What::Greeted(peer) if self.connections[peer as usize].open => {
                let node = self.connections[peer as usize].node;
                self.nodes[node].peer = Some(peer);
                let hello = self.hello(node);
                self.say(peer, ToCoordinator::Hello(hello));
                self.tell(node, ice_agent::Event::Reconnected);
                self.at(self.now + interval, What::AgentAlive(peer));
            }
            What::Impatient(_) | What::Greeted(_) => {}
            What::Comes(input) => self.comes(input),
            What::Works => self.work(),
            What::Heard(peer, number) => self.hears(peer, number),
            What::AgentAlive(peer) => {
                let Connection { node, open, agent_said, .. } = self.connections[peer as usize];
                if open && !self.nodes[node].dead && self.is_of_node(peer) {
                    if agent_said + interval <= self.now {
                        self.say(peer, ToCoordinator::KeepAlive);
                    }
                    self.at(self.connections[peer as usize].agent_said + interval, What::AgentAlive(peer));
                }
            }
            What::HostAlive(peer) => {
                let Connection { open, host_said, .. } = self.connections[peer as usize];
                let due = host_said + interval <= self.now;
                if open && due {
                    self.comes(Input::KeepAlive(peer));
                    self.at(self.now + interval, What::HostAlive(peer));
                } else if open {
                    self.at(host_said + interval, What::HostAlive(peer));
                }
            }
            What::Silence(peer) => {
                let Connection { open, heard, .. } = self.connections[peer as usize];
                if open && heard + silence <= self.now {
                    self.comes(Input::Lost(peer));
                } else if open {
                    self.at(heard + silence, What::Silence(peer));
                }
            }
            What::Parked { node, round } => {
                for local_rank in 0..RANKS_PER_NODE {
                    self.tell(node, ice_agent::Event::Parked { local_rank, round });
                }
            }
        }
    }

    /// Accepts a connection if the kernel of the coordinator's host has room. Otherwise the node's
    /// kernel repeats the request.
    fn asks(&mut self, node: usize, tries: u32) {
        if self.to_accept >= BACKLOG {
            self.trouble.dropped += 1;
            // If the agent's own wait ends before the kernel's next attempt, the agent starts a new
            // connection.
            let after = RESEND * (1 << tries);
            return if RESEND * ((2 << tries) - 1) < ANSWER {
                self.connect(node, after, tries + 1);
            } else {
                self.connect(node, after.min(ANSWER) + RETRY, 0);
            };
        }
        let peer = self.connections.len() as Peer;
        let now = self.now;
        self.connections.push(Connection {
            node,
            open: true,
            heard: now,
            host_said: now,
            agent_said: now,
            to_host: now,
            to_agent: now,
        });
        self.comes(Input::Accept(peer));
        let comes = self.now + self.one_way();
        self.at(comes, What::Accepted(peer));
    }

    fn is_of_node(&self, peer: Peer) -> bool {
        self.nodes[self.connections[peer as usize].node].peer == Some(peer)
    }

    fn gives_up(&mut self, peer: Peer) {
        let connection = &mut self.connections[peer as usize];
        if std::mem::take(&mut connection.open) {
            let node = connection.node;
            self.trouble.given_up += 1;
            self.connect(node, RETRY, 0);
        }
    }

    fn say(&mut self, peer: Peer, message: ToCoordinator) {
        let sent = self.now + self.one_way();
        let through = self.incoming.pass(sent, frame_len(&message), self.config.network.bandwidth);
        let connection = &mut self.connections[peer as usize];
        connection.agent_said = self.now;
        connection.to_host = connection.to_host.max(through);
        let comes = connection.to_host;
        self.said.push(Some(message));
        self.at(comes, What::Comes(Input::Said(peer, self.said.len() - 1)));
    }

    fn hears(&mut self, peer: Peer, number: usize) {
        let node = self.connections[peer as usize].node;
        let Some(message) = self.heard[number].take() else { return };
        if self.nodes[node].dead || !self.is_of_node(peer) || message == ToAgent::KeepAlive {
            return;
        }
        if matches!(message, ToAgent::RoundBroken { .. }) {
            self.nodes[node].knows = self.now;
        }
        self.tell(node, ice_agent::Event::Coordinator(message));
    }

    pub(super) fn tell(&mut self, node: usize, event: ice_agent::Event) {
        for action in self.nodes[node].agent.handle(self.now, event) {
            match action {
                Action::Send(message) => {
                    if let Some(peer) = self.nodes[node].peer {
                        self.say(peer, message);
                    }
                }
                Action::Spawn(round) => {
                    let (last, count) = self.started;
                    self.started = (round.number, if last == round.number { count + 1 } else { 1 });
                    self.nodes[node].view = Some(round);
                    for local_rank in 0..RANKS_PER_NODE {
                        self.tell(node, ice_agent::Event::Survivor(local_rank));
                    }
                }
                Action::RequestStop(_) => {
                    self.nodes[node].knows = self.now;
                    let round = self.nodes[node].view.as_ref().map_or(0, |view| view.number);
                    self.at(self.now, What::Parked { node, round });
                }
                _ => {}
            }
        }
    }
}
