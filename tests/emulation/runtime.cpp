// The scheduler of the fibers, and a launch of the batch kernel: returns the threads that are stuck for good.
Fiber* cur; std::deque<Fiber*> ready; Dim grid_dim; static void* main_sp; static int alive; static const BatchArguments* the_args;
extern "C" void switch_stack(void** from, void* to);
asm(".text\n.globl switch_stack\nswitch_stack:\npush %rbx\npush %rbp\npush %r12\npush %r13\npush %r14\npush %r15\nmov %rsp,(%rdi)\nmov %rsi,%rsp\npop %r15\npop %r14\npop %r13\npop %r12\npop %rbp\npop %rbx\nret\n");
void schedule() {
    Fiber* self = cur;
    if (ready.empty()) { void** sp = &self->sp; switch_stack(sp, main_sp); return; }
    cur = ready.front(); ready.pop_front();
    if (cur == self) return;
    switch_stack(&self->sp, cur->sp);
}
static void entry() {
    batch(*the_args);
    cur->done = true; --alive;
    if (ready.empty()) { void* dummy; switch_stack(&dummy, main_sp); }
    cur = ready.front(); ready.pop_front();
    void* dummy; switch_stack(&dummy, cur->sp);
}
extern "C" int run_batch(const BatchArguments* a) {
    the_args = a; grid_dim.x = BLOCKS;
    std::vector<Block> blocks(BLOCKS); std::vector<Fiber*> fibers;
    const size_t STACK = 1 << 17;
    for (int b = 0; b < BLOCKS; ++b) {
        blocks[b].memory = (unsigned char*)aligned_alloc(1024, (sizeof(Shared) + 1023) / 1024 * 1024);
        memset(blocks[b].memory, 0xFF, sizeof(Shared));
        blocks[b].warps.resize(THREADS / 32);
        for (int t = 0; t < THREADS; ++t) {
            Fiber* f = new Fiber; f->stack = (char*)aligned_alloc(4096, STACK);
            f->tid.x = t; f->bid.x = b; f->block = &blocks[b]; f->warp = &blocks[b].warps[t / 32]; f->lane = t % 32;
            void** sp = (void**)(f->stack + STACK - 64);
            *--sp = 0; *--sp = (void*)entry; for (int i = 0; i < 6; ++i) *--sp = 0;
            f->sp = sp; fibers.push_back(f); ready.push_back(f);
        }
    }
    alive = fibers.size();
    cur = ready.front(); ready.pop_front();
    switch_stack(&main_sp, cur->sp);
    int left = alive;
    if (left) for (auto f : fibers) if (!f->done) fprintf(stderr, "stuck: block %u warp %u (%s, arrived %d)\n", f->bid.x, f->tid.x / 32, f->warp->what ? f->warp->what : "-", f->warp->arrived);
    for (auto f : fibers) { free(f->stack); delete f; }
    for (auto& b : blocks) free(b.memory);
    return left;
}
