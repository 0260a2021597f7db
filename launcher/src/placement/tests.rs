use std::collections::{BTreeMap, BTreeSet};
use std::fs;

use proptest::prelude::*;
use tempfile::TempDir;

use super::error::PlacementError;
use super::{NumaBinding, bind, cpulist, gpu_addresses, threads_per_rank};

/// A made-up machine: its sysfs, and the affinity mask of the agent.
struct Machine {
    sys: TempDir,
    allowed: BTreeSet<u32>,
}

impl Machine {
    fn new() -> Self {
        Self { sys: tempfile::tempdir().unwrap(), allowed: BTreeSet::new() }
    }

    /// Two sockets of two nodes of four cores of two hyper-threads, numbered like on Intel: CPU 16
    /// is the sibling of CPU 0.
    fn two_sockets() -> Self {
        let mut machine = Self::new();
        for node in 0..4 {
            let first = node * 4;
            machine.node(node, &format!("{first}-{},{}-{}", first + 3, first + 16, first + 19));
            for core in first..first + 4 {
                for cpu in [core, core + 16] {
                    machine.cpu(cpu, node / 2, &format!("{core},{}", core + 16));
                }
            }
        }
        machine
    }

    /// One socket and node, four core complexes of four cores, like on AMD.
    fn four_complexes() -> Self {
        let mut machine = Self::new();
        machine.node(0, "0-15");
        for cpu in 0..16 {
            machine.cpu(cpu, 0, &cpu.to_string());
            machine.cache(cpu, 0, "1", "Data", &cpu.to_string());
            machine.cache(cpu, 1, "9", "Instruction", &cpu.to_string());
            machine.cache(cpu, 2, "2", "Unified", &cpu.to_string());
            machine.cache(cpu, 3, "3", "Unified", &format!("{}-{}", cpu / 4 * 4, cpu / 4 * 4 + 3));
        }
        machine
    }

    fn write(&self, path: &str, text: &str) {
        let path = self.sys.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, format!("{text}\n")).unwrap();
    }

    fn node(&self, node: u32, cpus: &str) {
        self.write(&format!("devices/system/node/node{node}/cpulist"), cpus);
    }

    fn cpu(&mut self, cpu: u32, socket: u32, siblings: &str) {
        let folder = format!("devices/system/cpu/cpu{cpu}/topology");
        self.write(&format!("{folder}/physical_package_id"), &socket.to_string());
        self.write(&format!("{folder}/thread_siblings_list"), siblings);
        self.allowed.insert(cpu);
    }

    fn cache(&self, cpu: u32, index: u32, level: &str, kind: &str, shared: &str) {
        let folder = format!("devices/system/cpu/cpu{cpu}/cache/index{index}");
        self.write(&format!("{folder}/level"), level);
        self.write(&format!("{folder}/type"), kind);
        self.write(&format!("{folder}/shared_cpu_list"), shared);
    }

    fn gpu(&self, address: &str, node: i32) -> Option<String> {
        self.write(&format!("bus/pci/devices/{address}/numa_node"), &node.to_string());
        Some(address.into())
    }

    fn allow(mut self, cpus: &str) -> Self {
        self.allowed = cpulist::parse(cpus).unwrap();
        self
    }

    fn bind(
        &self,
        binding: NumaBinding,
        gpus: &[Option<String>],
    ) -> Result<Vec<BTreeSet<u32>>, PlacementError> {
        bind(binding, gpus, self.sys.path(), &self.allowed)
    }

    #[track_caller]
    fn check(&self, binding: NumaBinding, gpus: &[Option<String>], expected: &[&str]) {
        let bound = self.bind(binding, gpus).unwrap();
        let bound: Vec<String> = bound.iter().map(cpulist::format).collect();
        assert_eq!(bound, expected, "{binding}");
    }

    #[track_caller]
    fn refuses(&self, binding: NumaBinding, gpus: &[Option<String>], named: &[&str]) {
        let error = self.bind(binding, gpus).unwrap_err().to_string();
        assert!(named.iter().all(|named| error.contains(named)), "{error}");
    }
}

fn cpu_ranks(ranks: usize) -> Vec<Option<String>> {
    vec![None; ranks]
}

#[test]
fn names_are_those_of_torchrun() {
    for name in ["node", "socket", "exclusive", "core-complex"] {
        assert_eq!(name.parse::<NumaBinding>().unwrap().to_string(), name);
    }
    assert!("cores".parse::<NumaBinding>().unwrap_err().contains("`cores`"));
}

#[test]
fn ranks_run_beside_their_gpus() {
    let machine = Machine::two_sockets();
    let gpus =
        [machine.gpu("0000:17:00.0", 1), machine.gpu("0000:65:00.0", 1), machine.gpu("0000:ca:00.0", 2)];
    machine.check(NumaBinding::Node, &gpus, &["4-7,20-23", "4-7,20-23", "8-11,24-27"]);
    machine.check(NumaBinding::Socket, &gpus, &["0-7,16-23", "0-7,16-23", "8-15,24-31"]);
    machine.check(NumaBinding::Exclusive, &gpus, &["4-5,20-21", "6-7,22-23", "8-11,24-27"]);
}

#[test]
fn cpu_ranks_are_spread_over_the_nodes() {
    let machine = Machine::two_sockets();
    machine.check(NumaBinding::Node, &cpu_ranks(2), &["0-3,16-19", "8-11,24-27"]);
    machine.check(
        NumaBinding::Exclusive,
        &cpu_ranks(6),
        &["0-1,16-17", "2-3,18-19", "4-7,20-23", "8-9,24-25", "10-11,26-27", "12-15,28-31"],
    );
    machine.check(NumaBinding::Node, &[], &[]);
}

#[test]
fn a_part_that_does_not_divide_gives_the_first_ranks_a_core_more() {
    let machine = Machine::two_sockets();
    let gpus = ["0000:01:00.0", "0000:02:00.0", "0000:03:00.0"].map(|address| machine.gpu(address, 0));
    machine.check(NumaBinding::Exclusive, &gpus, &["0-1,16-17", "2,18", "3,19"]);
}

#[test]
fn each_rank_gets_a_core_complex_and_the_first_one_comes_again() {
    let machine = Machine::four_complexes();
    let expected = ["0-3", "4-7", "8-11", "12-15", "0-3"];
    machine.check(NumaBinding::CoreComplex, &cpu_ranks(5), &expected);
}

#[test]
fn core_complexes_with_more_cpus_come_first() {
    let machine = Machine::four_complexes().allow("1,4-6,8-11,13-15");
    machine.check(NumaBinding::CoreComplex, &cpu_ranks(4), &["8-11", "4-6", "13-15", "1"]);
}

#[test]
fn a_machine_without_numa_folder_is_one_node() {
    let mut machine = Machine::new();
    for cpu in 0..4 {
        machine.cpu(cpu, cpu / 2, &format!("{}-{}", cpu / 2 * 2, cpu / 2 * 2 + 1));
    }
    let gpus = [Some("0000:17:00.0".into()), None];
    for binding in [NumaBinding::Node, NumaBinding::Socket] {
        machine.check(binding, &gpus, &["0-3", "0-3"]);
    }
    machine.check(NumaBinding::Exclusive, &gpus, &["0-1", "2-3"]);
    machine.refuses(NumaBinding::CoreComplex, &gpus, &["cpu0/cache", "leave --numa-binding out"]);
}

#[test]
fn a_gpu_without_a_node_belongs_to_the_first_one() {
    let machine = Machine::two_sockets();
    machine.check(NumaBinding::Node, &[machine.gpu("0000:17:00.0", -1)], &["0-3,16-19"]);
}

#[test]
fn nodes_that_have_memory_only_get_no_ranks() {
    let machine = Machine::two_sockets();
    machine.node(4, "");
    let expected = ["0-3,16-19", "0-3,16-19", "4-7,20-23", "8-11,24-27", "12-15,28-31"];
    machine.check(NumaBinding::Node, &cpu_ranks(5), &expected);
    machine.check(NumaBinding::Socket, &cpu_ranks(2), &["0-7,16-23", "8-15,24-31"]);
    machine.refuses(NumaBinding::Node, &[machine.gpu("0000:17:00.0", 4)], &["NUMA node 4"]);
}

#[test]
fn ranks_stay_within_the_affinity_mask() {
    let machine = Machine::two_sockets().allow("2-5,18,24");
    let gpus = [machine.gpu("0000:17:00.0", 0), machine.gpu("0000:65:00.0", 1)];
    machine.check(NumaBinding::Node, &gpus, &["2-3,18", "4-5"]);
    machine.check(NumaBinding::Socket, &gpus, &["2-5,18", "2-5,18"]);
    machine.check(NumaBinding::Exclusive, &gpus, &["2-3,18", "4-5"]);
    machine.check(NumaBinding::Node, &cpu_ranks(3), &["2-3,18", "4-5", "24"]);
    machine.refuses(NumaBinding::Node, &[machine.gpu("0000:17:00.0", 3)], &["2-5,18,24", "NUMA node 3"]);
}

#[test]
fn a_socket_is_known_by_cpus_outside_the_mask_too() {
    let machine = Machine::two_sockets().allow("4-7");
    machine.check(NumaBinding::Socket, &[machine.gpu("0000:17:00.0", 0)], &["4-7"]);
    machine.refuses(NumaBinding::Socket, &[machine.gpu("0000:17:00.0", 2)], &["socket 1"]);
}

#[test]
fn more_ranks_than_cores_cannot_be_exclusive() {
    let machine = Machine::two_sockets();
    let gpus = vec![machine.gpu("0000:17:00.0", 2); 5];
    machine.refuses(
        NumaBinding::Exclusive,
        &gpus,
        &["5 ranks", "NUMA node 2", "4 physical cores", "--numa-binding node"],
    );
}

#[test]
fn what_sysfs_lacks_is_named() {
    let machine = Machine::two_sockets();
    machine.refuses(NumaBinding::Node, &[Some("0000:17:00.0".into())], &["0000:17:00.0/numa_node"]);
    machine.node(0, "none");
    machine.refuses(NumaBinding::Node, &cpu_ranks(1), &["`none`", "node0/cpulist"]);
}

#[test]
fn the_addresses_of_the_driver_lead_to_sysfs() {
    let (machine, proc) = (Machine::two_sockets(), tempfile::tempdir().unwrap());
    for (address, node) in [("0000:CA:00.0", 3), ("0000:17:00.0", 1)] {
        machine.gpu(&address.to_ascii_lowercase(), node);
        let folder = proc.path().join("driver/nvidia/gpus").join(address);
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join("information"), format!("Bus Location: \t {address}\n")).unwrap();
    }
    let gpus: Vec<_> = gpu_addresses(proc.path()).into_iter().map(Some).collect();
    machine.check(NumaBinding::Node, &gpus, &["4-7,20-23", "12-15,28-31"]);
}

/// Two sockets of one node of 32 cores each, eight GPUs: the example of docs/placement.md.
#[test]
fn the_example_of_the_guide() {
    let mut machine = Machine::new();
    for node in 0..2 {
        let first = node * 32;
        machine.node(node, &format!("{first}-{},{}-{}", first + 31, first + 64, first + 95));
        for core in first..first + 32 {
            for cpu in [core, core + 64] {
                machine.cpu(cpu, node, &format!("{core},{}", core + 64));
            }
        }
    }
    let gpus: Vec<_> = (0..8).map(|gpu| machine.gpu(&format!("0000:{gpu}7:00.0"), gpu / 4)).collect();
    let exclusive: Vec<String> = (0..8)
        .map(|rank| rank * 8)
        .map(|core| format!("{core}-{},{}-{}", core + 7, core + 64, core + 71))
        .collect();
    let exclusive: Vec<&str> = exclusive.iter().map(String::as_str).collect();
    machine.check(NumaBinding::Exclusive, &gpus, &exclusive);
    let nodes = [["0-31,64-95"; 4], ["32-63,96-127"; 4]].concat();
    machine.check(NumaBinding::Node, &gpus, &nodes);
    machine.check(NumaBinding::Socket, &gpus, &nodes);
    let some = [&gpus[..1], &gpus[4..7]].concat();
    let bound = machine.bind(NumaBinding::Exclusive, &some).unwrap();
    assert_eq!(bound.iter().map(BTreeSet::len).collect::<Vec<_>>(), [64, 22, 22, 20]);
}

#[test]
fn threads_are_shared_out() {
    for (allowed, ranks, threads) in [(64, 8, 8), (10, 4, 2), (2, 4, 1), (0, 1, 1), (8, 0, 8)] {
        assert_eq!(threads_per_rank(allowed, ranks), threads, "{allowed} CPUs, {ranks} ranks");
    }
}

/// The shape of a machine: cores of each node, hyper-threads per core, whether siblings have
/// consecutive numbers, allowed CPUs, and the node of each rank's GPU.
#[derive(Debug, Clone)]
struct Shape {
    cores_of_nodes: Vec<u32>,
    threads: u32,
    neighbours: bool,
    allowed: Vec<bool>,
    gpus: Vec<Option<u32>>,
}

impl Shape {
    fn any() -> impl Strategy<Value = Self> {
        let nodes = proptest::collection::vec(1_u32..7, 1..5);
        (nodes, 1_u32..4, any::<bool>()).prop_flat_map(|(cores_of_nodes, threads, neighbours)| {
            let cpus = (cores_of_nodes.iter().sum::<u32>() * threads) as usize;
            let allowed = proptest::collection::vec(proptest::bool::weighted(0.8), cpus);
            let gpu = proptest::option::of(0..cores_of_nodes.len() as u32);
            (allowed, proptest::collection::vec(gpu, 1..8)).prop_map(move |(allowed, gpus)| Self {
                cores_of_nodes: cores_of_nodes.clone(),
                threads,
                neighbours,
                allowed,
                gpus,
            })
        })
    }

    /// Returns the cores of each node.
    fn cores(&self) -> Vec<Vec<BTreeSet<u32>>> {
        let (all, mut core) = (self.cores_of_nodes.iter().sum::<u32>(), 0..);
        let thread =
            |core, thread| if self.neighbours { core * self.threads + thread } else { core + thread * all };
        let siblings = |core| (0..self.threads).map(|index| thread(core, index)).collect();
        self.cores_of_nodes
            .iter()
            .map(|cores| core.by_ref().take(*cores as usize).map(siblings).collect())
            .collect()
    }

    fn build(&self) -> Machine {
        let mut machine = Machine::new();
        for (node, cores) in (0..).zip(self.cores()) {
            machine.node(node, &cpulist::format(&cores.iter().flatten().copied().collect()));
            for core in cores {
                core.iter().for_each(|cpu| machine.cpu(*cpu, node, &cpulist::format(&core)));
            }
        }
        machine.allowed.retain(|cpu| self.allowed[*cpu as usize]);
        machine
    }
}

proptest! {
    // Few cases, because each case writes a folder of files.
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn exclusive_ranks_share_out_all_cores_of_their_nodes(shape in Shape::any()) {
        let machine = shape.build();
        let gpus: Vec<_> = shape.gpus.iter().enumerate().map(|(rank, node)| {
            node.and_then(|node| machine.gpu(&format!("0000:{rank:02x}:00.0"), node as i32))
        }).collect();
        // The allowed part of each core.
        let cores: Vec<Vec<BTreeSet<u32>>> = shape.cores().into_iter().map(|cores| {
            let left = cores.iter().map(|core| core & &machine.allowed);
            left.filter(|core| !core.is_empty()).collect()
        }).collect();
        let usable: Vec<usize> = (0..cores.len()).filter(|node| !cores[*node].is_empty()).collect();
        let mut ranks_of_nodes = BTreeMap::<usize, Vec<usize>>::new();
        for (rank, gpu) in shape.gpus.iter().enumerate() {
            let node = match gpu {
                Some(node) => *node as usize,
                None if usable.is_empty() => 0,
                None => usable[rank * usable.len() / gpus.len()],
            };
            ranks_of_nodes.entry(node).or_default().push(rank);
        }
        let fits = ranks_of_nodes.iter().all(|(node, ranks)| cores[*node].len() >= ranks.len());
        let bound = machine.bind(NumaBinding::Exclusive, &gpus);
        prop_assert_eq!(bound.is_ok(), fits, "{:?}", bound);
        let Ok(bound) = bound else { return Ok(()) };
        for (node, ranks) in ranks_of_nodes {
            let of_rank = |rank: &usize| cores[node].iter().filter(|core| core.is_subset(&bound[*rank])).count();
            let counts: Vec<usize> = ranks.iter().map(of_rank).collect();
            prop_assert!(counts.is_sorted_by(|before, after| before >= after), "{:?}", counts);
            prop_assert!(counts[0] - counts[counts.len() - 1] <= 1, "{:?}", counts);
            // Each set consists of whole cores, and each core is in one set.
            prop_assert_eq!(counts.iter().sum::<usize>(), cores[node].len());
            prop_assert!(counts.iter().all(|count| *count > 0));
            let cpus: usize = ranks.iter().map(|rank| bound[*rank].len()).sum();
            prop_assert_eq!(cpus, cores[node].iter().map(BTreeSet::len).sum::<usize>());
        }
        prop_assert!(bound.iter().all(|cpus| cpus.is_subset(&machine.allowed)));
    }
}
